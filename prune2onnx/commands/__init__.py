"""One module per verb of the command line: its steps in order; the steps live in other modules."""
