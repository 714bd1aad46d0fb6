"""ONNX files, and ONNX Runtime to run them."""
