"""diffcore: fused kernels and agents for diffusion-based reinforcement learning."""

from diffcore import nn, ops
from diffcore._config import __version__, show_config
from diffcore.ops._dispatch import explain
from diffcore.schedule import DiffusionSchedule

__all__ = ["DiffusionSchedule", "__version__", "explain", "nn", "ops", "show_config"]
