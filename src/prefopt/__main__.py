"""`python -m prefopt`: the same as the command `prefopt`."""

import sys

from prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
