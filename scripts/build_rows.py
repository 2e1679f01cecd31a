"""The same as `prefopt build-rows`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("build-rows")
