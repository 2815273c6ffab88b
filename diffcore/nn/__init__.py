"""Small networks in the layout that the ops read."""

from diffcore.nn.fourier import RandomFourierFeatures
from diffcore.nn.modules import MLP, Denoiser, TwinCritic, time_embedding

__all__ = ["MLP", "Denoiser", "RandomFourierFeatures", "TwinCritic", "time_embedding"]
