"""Tasks: what a network is trained for, and by which metric it is judged."""
