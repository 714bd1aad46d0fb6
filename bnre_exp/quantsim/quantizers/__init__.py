"""Fake quantization: quantizers, their ranges, and the layout of weights."""
