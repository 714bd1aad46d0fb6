"""Simulated quantization of a torch model."""
