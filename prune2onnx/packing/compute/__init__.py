"""Weights that stay narrow while a session runs: operators that compute in int8 or int4."""
