"""The same as `prefopt pipeline`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("pipeline")
