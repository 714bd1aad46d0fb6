"""The command line. The one room that imports Hydra."""
