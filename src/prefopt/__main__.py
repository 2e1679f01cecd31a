"""`python -m prefopt`: the same as the command `prefopt`."""

from prefopt.cli import main
from prefopt.launch import leave

if __name__ == "__main__":
    leave(main())
