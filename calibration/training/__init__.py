"""Trains heads on a frozen backbone, and a LoRA adapter together with them."""
