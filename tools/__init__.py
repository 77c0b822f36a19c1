"""The command line: its verbs, and the rooms that hold their work."""
