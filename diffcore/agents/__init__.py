"""Agents: each file reads like its paper, in the paper's order, on top of :mod:`diffcore.ops`.

An agent knows neither the environment nor the training loop. Actions live in ``[-1, 1]``; what it
needs of a replay buffer is the :class:`Replay` protocol.
"""

from diffcore.agents.diffsr import DIFFSR_DEFAULTS, DiffSR, DiffSRConfig
from diffcore.agents.dipo import DIPO, DIPO_DEFAULTS, MODES, DIPOConfig, ModeSwitches
from diffcore.agents.policies import DiffusionPolicy, MLPPolicy, Policy, VAEPolicy
from diffcore.agents.replay_protocol import Batch, Replay
from diffcore.agents.representation import DiffusionRepresentation

__all__ = [
    "DIFFSR_DEFAULTS",
    "DIPO",
    "DIPO_DEFAULTS",
    "MODES",
    "Batch",
    "DIPOConfig",
    "DiffSR",
    "DiffSRConfig",
    "DiffusionPolicy",
    "DiffusionRepresentation",
    "MLPPolicy",
    "ModeSwitches",
    "Policy",
    "Replay",
    "VAEPolicy",
]
