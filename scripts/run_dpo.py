"""The same as `prefopt dpo`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("dpo")
