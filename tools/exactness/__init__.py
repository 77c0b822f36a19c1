"""Holds decoding to be exact: where two runs of one bundle first differ, and whether rounding explains it."""
