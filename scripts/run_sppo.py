"""The same as `prefopt sppo`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("sppo")
