"""A folded network as an ONNX model with QuantizeLinear and DequantizeLinear."""
