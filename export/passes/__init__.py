"""Lowers the traced graph to standard, CPU and device operators."""
