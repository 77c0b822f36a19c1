"""Observes a bundle's activations and finds scales and smoothing factors."""
