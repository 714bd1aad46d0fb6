"""A machine without Fashion-MNIST, for this process and those it starts: opening its files fails.

Python imports a module of this name at its start, from PYTHONPATH; tests/conftest.py puts this folder there.
"""

import sys


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and "fashion-mnist" in str(arguments[0]):
        raise FileNotFoundError(f"{arguments[0]}: BNRE_TESTS_WITHOUT_DATA=1 hides it")


sys.addaudithook(_refuse)
