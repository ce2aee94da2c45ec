"""Calibration: weights rounded and pruned by what flows through a network on examples."""
