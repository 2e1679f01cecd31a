"""The same as `prefopt score-references`."""

from prefopt.cli import script

if __name__ == "__main__":
    script("score-references")
