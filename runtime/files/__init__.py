"""Reads and writes the files that pass between export, calibration and the runtime: bundles, records, heads."""
