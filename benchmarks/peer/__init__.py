"""Other engines beside ours: a process for each (:mod:`.serve`), and what benchmarks/peers.py measures and writes of them."""
