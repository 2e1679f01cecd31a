"""The same as `prefopt split`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("split")
