"""Engines behind one interface: a step plan in, a step result out."""
