"""``python -m bnre_exp``: the command line."""

if __name__ == "__main__":  # a process that is spawned imports this file too, and needs nothing of it
    import sys

    from bnre_exp.cli.launch import main

    sys.exit(main())
