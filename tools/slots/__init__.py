"""Measures several requests at a time, as their users see them."""
