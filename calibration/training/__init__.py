"""Trains heads, and a LoRA adapter together with them."""
