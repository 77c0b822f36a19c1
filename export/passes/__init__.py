"""Lowers the traced graph to standard, CPU and device operators, and fuses operators of the CPU graph."""
