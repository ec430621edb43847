"""Training a pair: data, objective, loop, checkpoints, runs."""
