"""Folded networks as files: safetensors and JSON, without pickle and without the model's own code."""
