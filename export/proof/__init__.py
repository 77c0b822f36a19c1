"""Proves an export before it is committed: compares its graphs with the torch module that they came from."""
