"""The same as `prefopt multi-reference-dpo`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("multi-reference-dpo")
