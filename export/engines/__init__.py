"""Builds TensorRT engines from a bundle's step graph."""
