"""Steps of many requests at a time: who holds a slot, what a step verifies, and what it emits."""
