"""Small networks in the layout that the ops read."""

from diffcore.nn.modules import MLP, Denoiser, TwinCritic, time_embedding

__all__ = ["MLP", "Denoiser", "TwinCritic", "time_embedding"]
