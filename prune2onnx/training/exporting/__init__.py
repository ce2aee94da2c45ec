"""What surrounds the export of a graph: the order of its weights, and why it failed."""
