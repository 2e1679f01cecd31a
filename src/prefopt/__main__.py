"""`python -m prefopt`: the same as the command `prefopt`."""

from prefopt.cli import main
from prefopt.launch import exit_process

if __name__ == "__main__":
    exit_process(main())
