"""Tests of ppl_models.processes."""
