"""Compares an exported graph with the torch module that it came from."""
