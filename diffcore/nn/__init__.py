"""Networks whose parameters come in the order that the ops expect."""

from diffcore.nn.fourier import RandomFourierFeatures
from diffcore.nn.gaussian import SquashedGaussian, Temperature
from diffcore.nn.modules import MLP, Denoiser, TwinCritic, time_embedding
from diffcore.nn.spectral import Psi, TwinRFFCritic, Zeta

__all__ = [
    "MLP",
    "Denoiser",
    "Psi",
    "RandomFourierFeatures",
    "SquashedGaussian",
    "Temperature",
    "TwinCritic",
    "TwinRFFCritic",
    "Zeta",
    "time_embedding",
]
