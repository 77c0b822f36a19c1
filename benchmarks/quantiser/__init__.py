"""Libraries' quantisation beside ours, for benchmarks/quantisers.py: one judge (:mod:`.judge`), a module for each library."""
