"""The same as `prefopt generate`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("generate")
