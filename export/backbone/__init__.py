"""Reads a backbone: through transformers, or as linked safetensors."""
