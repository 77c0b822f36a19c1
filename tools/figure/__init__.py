"""Turns reports of bench into pictures."""
