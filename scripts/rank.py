"""The same as `prefopt rank`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("rank")
