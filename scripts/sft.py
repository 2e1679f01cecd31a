"""The same as `prefopt sft`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("sft")
