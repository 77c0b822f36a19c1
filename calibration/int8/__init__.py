"""Observes a bundle's activations and finds their int8 scales, smoothing factors and second moments."""
