"""The bounds before independent juries."""
