"""`python -m lingc`: the command line where its script is not installed."""

import sys

from lingc.cli import main

if __name__ == "__main__":
    sys.exit(main())
