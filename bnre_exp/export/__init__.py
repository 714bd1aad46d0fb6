"""What leaves the framework: checkpoints, ONNX models, encodings."""
