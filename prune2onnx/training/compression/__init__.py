"""Compression in a loop of the user's own, and what it has in common with `fit`."""
