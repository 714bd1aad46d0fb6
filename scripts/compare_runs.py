#!/usr/bin/env python3
"""The command bnre-exp-compare, from a checkout."""

import sys

from bnre_exp.cli.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
