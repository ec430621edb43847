"""Plain torch modules: no Pyro, no probability."""

from ppl_models.networks.arrays import ArrayMLP
from ppl_models.networks.codes import CodeEncoder
from ppl_models.networks.diffusers import DiffusersUNet
from ppl_models.networks.gaussian_layers import LadderEncoder
from ppl_models.networks.labels import LabelShift, labelled
from ppl_models.networks.mlp import MLP, Decoder, GaussianEncoder
from ppl_models.networks.residual_mlp import ResidualMLP
from ppl_models.networks.time_embedding import TimeEmbedding
from ppl_models.networks.transformer import TransformerDenoiser
from ppl_models.networks.unet import UNet

__all__ = [
    "MLP",
    "ArrayMLP",
    "CodeEncoder",
    "Decoder",
    "DiffusersUNet",
    "GaussianEncoder",
    "LabelShift",
    "LadderEncoder",
    "ResidualMLP",
    "TimeEmbedding",
    "TransformerDenoiser",
    "UNet",
    "labelled",
]
