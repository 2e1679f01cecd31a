"""The same as `prefopt check`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("check")
