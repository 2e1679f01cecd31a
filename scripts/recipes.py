"""The same as `prefopt recipes`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("recipes")
