"""Refuses models that the step graph cannot express, before their weights are read, and says in one line why a library failed."""
