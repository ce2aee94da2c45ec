"""Approximation without training: fewer levels, zeros and half precision for trained weights."""
