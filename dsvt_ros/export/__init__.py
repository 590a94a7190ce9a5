"""ONNX export of the two networks, and the model folder that it leaves (docs/backends.md)."""
