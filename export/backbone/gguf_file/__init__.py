"""Reads a model from a GGUF file as llama.cpp does: config, weights and tokenizer. What can't be mapped is refused by name."""
