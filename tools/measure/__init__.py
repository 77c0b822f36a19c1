"""Measures a bundle: step times, divergence, agreement, hits."""
