"""Compares two bundles or variants, and shows it as a table and a page."""
