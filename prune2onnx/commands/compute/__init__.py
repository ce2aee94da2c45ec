"""What a file computes in: chosen, measured and told, for the verbs that have --compute."""
