"""Reads a backbone: its sizes, its tokenizer, and its weights through transformers or as linked safetensors."""
