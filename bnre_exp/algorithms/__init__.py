"""The algorithms, torch only, one file a stage."""
