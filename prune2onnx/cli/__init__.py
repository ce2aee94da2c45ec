"""The command line: options, progress and tables; the verbs' work is in `commands`."""
