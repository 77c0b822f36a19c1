"""Traces the backbone with its heads into one abstract step graph."""
