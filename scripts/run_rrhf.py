"""The same as `prefopt rrhf`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("rrhf")
