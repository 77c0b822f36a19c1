"""Estimates bytes and step times of a model on a GPU."""
