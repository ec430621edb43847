"""Slow, obvious computations that import nothing they judge."""
