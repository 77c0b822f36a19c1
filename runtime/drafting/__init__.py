"""Which tokens a step verifies below the root, and how many of them pay."""
