"""``python -m bnre_exp``: the command line."""

import sys

from bnre_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
