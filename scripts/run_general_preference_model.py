"""The same as `prefopt general-preference-model`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("general-preference-model")
