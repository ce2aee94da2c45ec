"""The names that mark a packed file; code that rewrites graphs leaves them alone."""

from __future__ import annotations

DOMAIN = "prune2onnx"
"""Operator set of the decode calls and their functions."""

DOMAIN_VERSION = 2
"""Version of that operator set; docs/FORMAT.md describes it."""

OP = "w"
"""The decode call, and its function."""

MARK = "prune2onnx"
"""Metadata entry of a packed file: most tools keep it, even those that undo the packing."""
