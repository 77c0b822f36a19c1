"""Holds decoding to be exact: finds where two runs of one bundle first differ, and tells rounding from errors."""
