"""Measures a bundle: step times, rates, distances of distributions, hits of its heads, sizes."""
