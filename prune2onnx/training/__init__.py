"""Training (`fit`): a network is trained, pruned and quantized, up to its export as a graph."""
