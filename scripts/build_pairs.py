"""The same as `prefopt build-pairs`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("build-pairs")
