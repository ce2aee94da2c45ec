"""Packing: weights as short streams that any onnxruntime decodes; lossless, or approximated."""
