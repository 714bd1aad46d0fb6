"""What leaves the framework: checkpoints."""
