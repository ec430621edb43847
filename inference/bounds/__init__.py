"""Bounds on the evidence: by site, by time-step, and beyond the ELBO."""

from inference.bounds.decomposition import decompose_elbo
from inference.bounds.particles import NotANumberError, PairError
from inference.bounds.terms import Decomposition, SiteTerm

__all__ = ["Decomposition", "NotANumberError", "PairError", "SiteTerm", "decompose_elbo"]
