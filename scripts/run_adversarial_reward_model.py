"""The same as `prefopt adversarial-reward-model`, for `accelerate launch`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("adversarial-reward-model")
