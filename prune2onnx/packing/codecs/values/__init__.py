"""How the values of weights are stored: one module for each kind, and one entry in `methods`."""
