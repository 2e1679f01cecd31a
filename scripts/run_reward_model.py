"""The same as `prefopt reward-model`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("reward-model")
