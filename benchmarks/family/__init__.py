"""Tiny models of every family, for benchmarks/families.py."""
