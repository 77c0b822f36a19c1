"""Heads that see the drafted tokens before theirs, for benchmarks/path_heads.py: how they learn, and their replay."""
