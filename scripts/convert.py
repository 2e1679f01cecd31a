"""The same as `prefopt convert`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("convert")
