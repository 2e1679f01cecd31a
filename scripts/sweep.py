"""The same as `prefopt sweep`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("sweep")
