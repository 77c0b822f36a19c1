"""Learns from data: trains heads on the backbone's own answers, fits their confidence, and measures scales for int8."""
