"""Plain torch modules: no Pyro, no probability."""

from ppl_models.networks.mlp import MLP, Decoder, GaussianEncoder

__all__ = ["MLP", "Decoder", "GaussianEncoder"]
