"""One module a verb of the program."""
