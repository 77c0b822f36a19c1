"""Rewrites graphs with weights, or weights and activations, in 8 or 4 bits: for the CPU's kernels and for engines."""
