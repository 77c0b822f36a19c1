"""Makes what other verbs start from: a known model, its bundle, scales, variants in few bits."""
