#!/usr/bin/env python3
"""The command bnre-exp-compare, from a checkout, in the environment that it is started from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bnre_exp.cli.launch import compare  # noqa: E402

if __name__ == "__main__":
    sys.exit(compare())
