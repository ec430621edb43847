"""Tests of ppl_models.networks."""
