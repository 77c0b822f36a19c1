"""Builds TensorRT engines from a bundle's device graph: what is built, of which network, in a process of its own."""
