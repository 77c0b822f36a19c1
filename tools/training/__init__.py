"""Trains heads and an adapter for a backbone: answers, both stages, hit rates."""
