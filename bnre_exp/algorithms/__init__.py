"""The algorithms, torch only: train, calibrate, re-estimate, fold, compare."""
