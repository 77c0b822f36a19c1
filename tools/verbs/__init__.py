"""Verbs of the program, one module each: options, one call of the work, and its report for a person."""
