"""Training runs: the loop, replay, evaluation, checkpoints and logs around any agent."""

from diffcore.training.config import TrainConfig
from diffcore.training.errors import (
    CheckpointError,
    ConfigError,
    EnvError,
    RunError,
    TrainingError,
    WriteError,
)
from diffcore.training.evaluation import Evaluation, Evaluator
from diffcore.training.loop import LoadedAgent, Trainer, TrainResult, load_agent, resume, train
from diffcore.training.registry import AGENTS, Agent, AgentConfig
from diffcore.training.replay import ReplayBuffer

__all__ = [
    "AGENTS",
    "Agent",
    "AgentConfig",
    "CheckpointError",
    "ConfigError",
    "EnvError",
    "Evaluation",
    "Evaluator",
    "LoadedAgent",
    "ReplayBuffer",
    "RunError",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "WriteError",
    "load_agent",
    "resume",
    "train",
]
