"""The same as `prefopt wpo`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("wpo")
