"""Small agents of every kind, and a replay over plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.agents import DIPO, Batch, DiffSR, DiffSRConfig, DIPOConfig

OBSERVATION_DIM, ACTION_DIM = 4, 2

#: What makes each kind of agent, by its name in a test's id.
KINDS: dict[str, dict[str, Any]] = {
    "dipo": {},
    "dipo-official": {"mode": "official", "update_actor_target_every": 2},
    "dipo-paper": {"mode": "paper"},
    "dipo-mlp": {"policy": "mlp"},
    "dipo-vae": {"policy": "vae"},
    "diffsr": {},
    "diffsr-official": {"mode": "official", "gram_weight": 0.1},
    "diffsr-paper": {"mode": "paper", "conditioning": "time_embedding"},
    "diffsr-orthogonal": {"fourier_frequencies": "orthogonal", "fourier_kind": "cos_sin"},
    "diffsr-elliptical": {"bonus": "elliptical"},
    "diffsr-kernel": {"bonus": "kernel", "bonus_samples": 8},
    "diffsr-frozen": {"freeze_representation": True},
}


def small_dipo_config(**changes: Any) -> DIPOConfig:
    small = {
        "hidden_dim": 32,
        "diffusion_steps": 5,
        "batch_size": 16,
        "action_gradient_steps": 3,
    }
    return DIPOConfig(**{**small, **changes})


def small_diffsr_config(**changes: Any) -> DiffSRConfig:
    small = {
        "feature_dim": 12,
        "psi_hidden_dim": 24,
        "zeta_hidden_dim": 20,
        "hidden_dim": 32,
        "noise_steps": 10,
        "batch_size": 16,
        "extra_feature_steps": 1,
    }
    return DiffSRConfig(**{**small, **changes})


def make_kind(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A small agent: ``kind`` is one of :data:`KINDS`."""
    changes = {**KINDS[kind], **changes}
    if kind.startswith("dipo"):
        return DIPO(OBSERVATION_DIM, ACTION_DIM, small_dipo_config(**changes), seed=seed)
    return DiffSR(OBSERVATION_DIM, ACTION_DIM, small_diffsr_config(**changes), seed=seed)


class TensorReplay:
    """The replay protocol over plain tensors; remembers what was drawn and written."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns
        self.columns.setdefault("best_action", columns["action"].clone())
        self.drawn: list[Batch] = []
        self.written: list[tuple[str, Tensor, Tensor]] = []

    @classmethod
    def random(cls, rows: int = 64, seed: int = 1) -> TensorReplay:
        generator = torch.Generator().manual_seed(seed)

        def normal(width: int) -> Tensor:
            return torch.randn(rows, width, generator=generator)

        return cls(
            state=normal(OBSERVATION_DIM),
            action=normal(ACTION_DIM).clamp(-1, 1),
            reward=normal(1),
            next_state=normal(OBSERVATION_DIM),
            mask=(normal(1) > -1).float(),
        )

    def __len__(self) -> int:
        return len(self.columns["state"])

    def next_index(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self), (batch_size,), generator=generator, device="cpu")

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        index = self.next_index(batch_size, generator)
        columns = {name: column[index] for name, column in self.columns.items()}
        self.drawn.append(Batch(index=index, **columns))
        return self.drawn[-1]

    def set_action(self, index: Tensor, action: Tensor) -> None:
        self.written.append(("action", index, action))
        self.columns["action"][index] = action

    def set_best_action(self, index: Tensor, action: Tensor) -> None:
        self.written.append(("best_action", index, action))
        self.columns["best_action"][index] = action
