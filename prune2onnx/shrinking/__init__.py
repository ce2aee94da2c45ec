"""Exact removal of dead channels, neurons and branches from ONNX graphs."""
