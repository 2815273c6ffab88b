"""The public ops: each in a folder with its reference beside the fast kernels."""

from diffcore.ops.action_gradient import action_gradient
from diffcore.ops.critic_loss import critic_loss
from diffcore.ops.denoising_loss import denoising_loss
from diffcore.ops.mlp import mlp
from diffcore.ops.mlp_ensemble import mlp_ensemble
from diffcore.ops.q_sample import q_sample
from diffcore.ops.representation_loss import representation_loss
from diffcore.ops.representation_step import representation_step
from diffcore.ops.reverse_diffusion import reverse_diffusion
from diffcore.ops.reverse_step import reverse_step
from diffcore.ops.rff_features import rff_features
from diffcore.ops.score_matching_loss import score_matching_loss
from diffcore.ops.soft_value import soft_value
from diffcore.ops.squashed_gaussian import squashed_gaussian

__all__ = [
    "action_gradient",
    "critic_loss",
    "denoising_loss",
    "mlp",
    "mlp_ensemble",
    "q_sample",
    "representation_loss",
    "representation_step",
    "reverse_diffusion",
    "reverse_step",
    "rff_features",
    "score_matching_loss",
    "soft_value",
    "squashed_gaussian",
]
