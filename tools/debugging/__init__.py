"""Kits for debugging an engine: inputs of real steps, expected outputs, and what polygraphy saved beside them."""
