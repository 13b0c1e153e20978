"""`python -m minipuzzle`."""

import sys

from minipuzzle.cli import main

if __name__ == "__main__":
    sys.exit(main())
