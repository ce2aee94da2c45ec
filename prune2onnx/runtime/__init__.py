"""onnxruntime: sessions, measurements, validation, and int8 by its quantizer."""
