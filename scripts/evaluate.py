"""The same as `prefopt evaluate`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("evaluate")
