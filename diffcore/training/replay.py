"""A ring of transitions, with the best action known for each beside the action taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore.agents import Batch
from diffcore.training.errors import CheckpointError


class ReplayBuffer:
    """The last ``capacity`` transitions.

    Memory is taken as it fills, not when the buffer is made. Next states are stored explicitly: at
    the end of an episode they aren't the next row's state.

    Args:
        capacity: transitions kept; at least 1.
        observation_dim: size of an observation.
        action_dim: size of an action.
        bootstrap_truncated: whether ``mask`` is 1 for a transition at which an episode was cut by
            its time limit without terminating.
        device: where transitions are stored and samples are returned.

    Raises:
        ValueError: if a size is below 1.
    """

    @torch.inference_mode(False)  # or the columns could be written in that mode alone
    def __init__(
        self,
        capacity: int,
        observation_dim: int,
        action_dim: int,
        *,
        bootstrap_truncated: bool,
        device: str | torch.device = "cpu",
    ) -> None:
        sizes = {
            "capacity": capacity,
            "observation_dim": observation_dim,
            "action_dim": action_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.capacity = capacity
        self.bootstrap_truncated = bootstrap_truncated
        self.device = torch.device(device)
        self.size = 0
        """Transitions stored."""
        self.position = 0
        """The row the next transition goes to."""

        def column(width: int) -> Tensor:
            return torch.empty(capacity, width, dtype=torch.float32, device=self.device)

        self._columns = {
            "state": column(observation_dim),
            "action": column(action_dim),
            "best_action": column(action_dim),
            "reward": column(1),
            "next_state": column(observation_dim),
            "terminated": column(1),
            "truncated": column(1),
        }

    def __len__(self) -> int:
        return self.size

    def add(
        self,
        state: Tensor,
        action: Tensor,
        reward: Tensor,
        next_state: Tensor,
        terminated: Tensor,
        truncated: Tensor,
    ) -> None:
        """Store ``N`` transitions in order, over the oldest where the buffer is full.

        Args:
            state, next_state: ``[N, observation_dim]``. Where an episode ended, ``next_state`` is
                its last observation, not the first of the next one.
            action: ``[N, action_dim]`` in ``[-1, 1]``.
            reward, terminated, truncated: ``[N]``, any dtype.

        Raises:
            ValueError: if a shape is wrong or ``N`` exceeds the capacity.
        """
        rows = state.shape[0]
        if rows > self.capacity:
            raise ValueError(f"can't store {rows} transitions in a buffer of {self.capacity}")
        given = {
            "state": state,
            "action": action,
            "reward": reward,
            "next_state": next_state,
            "terminated": terminated,
            "truncated": truncated,
        }
        for name, value in given.items():
            is_number = name in ("reward", "terminated", "truncated")
            expected = (rows,) if is_number else (rows, self._columns[name].shape[1])
            if value.shape != expected:
                raise ValueError(f"{name} has shape {list(value.shape)}, not {list(expected)}")
        # A batch that runs past the end is stored in two pieces.
        before_end = min(rows, self.capacity - self.position)
        for name, value in {**given, "best_action": action}.items():
            column = self._columns[name]
            values = value.reshape(rows, column.shape[1])
            column[self.position : self.position + before_end] = values[:before_end]
            column[: rows - before_end] = values[before_end:]
        self.position = (self.position + rows) % self.capacity
        self.size = min(self.size + rows, self.capacity)

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw transitions uniformly with replacement. ``generator`` is the only randomness.

        Raises:
            ValueError: if the buffer is empty.
        """
        if self.size == 0:
            raise ValueError("can't sample from an empty replay buffer")
        index = torch.randint(
            self.size, (batch_size,), generator=generator, device=generator.device
        ).to(self.device)
        rows = {name: column.index_select(0, index) for name, column in self._columns.items()}
        terminated, truncated = rows.pop("terminated"), rows.pop("truncated")
        stops = terminated if self.bootstrap_truncated else torch.maximum(terminated, truncated)
        return Batch(index=index, mask=1.0 - stops, **rows)

    def set_action(self, index: Tensor, action: Tensor) -> None:
        """Overwrite the taken actions at ``index`` (``[B]`` int64) with ``action`` (``[B, A]``)."""
        self._columns["action"][index] = action

    def set_best_action(self, index: Tensor, action: Tensor) -> None:
        """Overwrite the best actions at ``index`` (``[B]`` int64) with ``action`` (``[B, A]``)."""
        self._columns["best_action"][index] = action

    def state_dict(self) -> dict[str, Any]:
        """The filled part. On the CPU its tensors share the buffer's memory: save before adding."""
        return {
            "capacity": self.capacity,
            "size": self.size,
            "position": self.position,
            "columns": {
                name: _exact_view(column[: self.size].cpu())
                for name, column in self._columns.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy in what :meth:`state_dict` returned.

        Raises:
            CheckpointError: if it comes from a buffer of another shape.
        """
        if state["capacity"] != self.capacity:
            raise CheckpointError(
                f"the saved replay buffer holds {state['capacity']} transitions, "
                f"this one {self.capacity}"
            )
        for name, column in self._columns.items():
            saved = state["columns"][name]
            if saved.shape != (state["size"], column.shape[1]):
                raise CheckpointError(
                    f"the saved replay buffer's {name} has shape {list(saved.shape)}, "
                    f"not {[state['size'], column.shape[1]]}"
                )
            column[: state["size"]] = saved.to(self.device)
        self.size = state["size"]
        self.position = state["position"]


def _exact_view(rows: Tensor) -> Tensor:
    """The same CPU memory as a tensor of its own.

    torch.save writes a view's whole storage, here all of the capacity; one made from the numpy
    array ends where the rows end.
    """
    return torch.from_numpy(rows.numpy())
