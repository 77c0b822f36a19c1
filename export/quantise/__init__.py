"""Rewrites graphs with weights, or weights and activations, in few bits."""
