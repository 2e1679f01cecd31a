"""The same as `prefopt report`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("report")
