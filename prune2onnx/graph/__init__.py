"""ONNX graphs: read, walk, rewrite and write; nothing here knows how weights are coded."""
