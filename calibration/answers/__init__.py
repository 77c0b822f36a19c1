"""Lets a backbone answer prompts, and keeps the answers on disk for training."""
