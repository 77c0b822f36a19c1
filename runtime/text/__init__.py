"""Converts text to token ids and back: tokenizer, chat template, stop strings, prompt files."""
