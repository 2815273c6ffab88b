"""What agents share below their algorithms: seeds, checks, saving and loading."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from diffcore.agents.checks import check_integer, check_rows
from diffcore.agents.optimization import learning, load_moments
from diffcore.agents.replay_protocol import Batch, Replay

ComputeDtype = Literal["float32", "bfloat16"]


class Saved(Protocol):
    """A part of an agent with a state of its own: a module, an optimiser, ..."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class BaseAgent(ABC):
    """An agent of networks and optimisers that draws from one generator.

    Its networks are float32 and live on ``device``, whatever torch's default dtype and device are,
    and learn whatever mode, torch.no_grad() or torch.inference_mode(), is on.

    Args:
        observation_dim: size of an observation vector.
        action_dim: size of an action vector; actions live in ``[-1, 1]``.
        config: hyper-parameters, a frozen dataclass with a ``batch_size``.
        seed: of everything drawn.
        device: where the networks live and observations and batches are expected.
        streams: how many independent seeds to draw; the last is the generator's.

    Raises:
        TypeError: if a size or the seed isn't an integer.
        ValueError: if a size isn't positive or the seed is negative.
    """

    name: ClassVar[str]
    """What a saved state says it belongs to."""
    shaped_by: ClassVar[tuple[str, ...]]
    """The fields of the configuration that a saved state must agree in."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        config: Any,
        *,
        seed: int,
        device: str | torch.device,
        streams: int,
    ) -> None:
        check_integer("observation_dim", observation_dim, at_least=1)
        check_integer("action_dim", action_dim, at_least=1)
        check_integer("seed", seed, at_least=0)
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.config = config
        self.device = torch.device(device)
        source = torch.Generator("cpu").manual_seed(seed)
        seeds = torch.randint(2**62, (streams,), generator=source, device="cpu")
        self.seeds: list[int] = seeds.tolist()
        self.generator = torch.Generator(self.device).manual_seed(self.seeds[-1])
        self.updates = 0
        """Updates done."""

    @abstractmethod
    def parts(self) -> dict[str, Saved]:
        """Everything with a state to save, by the name it is saved under."""

    @property
    @abstractmethod
    def policy(self) -> nn.Module:
        """The network that acting needs."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise-equal continuation needs; readable with ``weights_only=True``.

        As with ``torch.nn.Module.state_dict`` the tensors are the live ones: save or copy them
        before the next update.
        """
        return {
            "agent": self.name,
            "config": dataclasses.asdict(self.config),
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            **{name: dict(part.state_dict()) for name, part in self.parts().items()},
            "generator": self.generator.get_state(),
            "generator_device": self.device.type,
            "updates": self.updates,
        }

    @learning()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy in a :meth:`state_dict` of an agent of the same sizes and kind.

        The config stays this agent's own. On another type of device the weights are taken over but
        not the random state, which has another meaning there; a warning says so.

        Raises:
            ValueError: if ``state`` lacks an entry or was saved by a differently shaped agent.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state lacks the entries {sorted(missing)}")
        ours = {
            "agent": self.name,
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
        }
        for name, expected in ours.items():
            if state[name] != expected:
                raise ValueError(f"state has {name}={state[name]!r}, this agent {expected!r}")
        self.check_saved_config(state["config"])

        for name, part in self.parts().items():
            if isinstance(part, torch.optim.Adam):
                load_moments(part, state[name])
            else:
                part.load_state_dict(state[name])
        self.updates = state["updates"]
        if state["generator_device"] == self.device.type:
            self.generator.set_state(state["generator"].cpu())
        else:
            warnings.warn(
                f"random state saved on {state['generator_device']!r} can't be continued on "
                f"{self.device.type!r}; the agent keeps the one it has",
                stacklevel=2,
            )

    def check_saved_config(self, saved: dict[str, Any]) -> None:
        """Raises ValueError unless weights saved under this configuration mean the same here."""
        for name in self.shaped_by:
            expected = getattr(self.config, name)
            if saved.get(name) != expected:
                raise ValueError(
                    f"state has {name}={saved.get(name)!r}, this agent's config {expected!r}"
                )

    def weights(self) -> dict[str, Tensor]:
        """The policy's weights, all that acting needs: detached contiguous copies on the CPU."""
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.policy.state_dict().items()
        }

    def sample(self, replay: Replay) -> Batch:
        """A batch of transitions."""
        return replay.sample(self.config.batch_size, self.generator)

    def check_observation(self, observation: object) -> None:
        """Raises TypeError or ValueError unless it is ``[B, observation_dim]`` float32 here."""
        check_rows("observation", observation, self.observation_dim, self.device)

    def check_batch(self, batch: Batch, **actions: Tensor) -> None:
        """Raises ValueError unless all shapes fit; ``actions`` are further ``[B, action_dim]``.

        A reward of shape [B] would broadcast against [B, 1] and train on nonsense.
        """
        rows = batch.state.shape[0]
        expected = {
            "state": (batch.state, self.observation_dim),
            "action": (batch.action, self.action_dim),
            "reward": (batch.reward, 1),
            "next_state": (batch.next_state, self.observation_dim),
            "mask": (batch.mask, 1),
            **{name: (action, self.action_dim) for name, action in actions.items()},
        }
        for name, (tensor, columns) in expected.items():
            if tensor.shape != (rows, columns):
                raise ValueError(
                    f"{name} must have shape [{rows}, {columns}], got {list(tensor.shape)}"
                )


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Modules made in this block get their weights from ``seed``; torch's own state is kept.

    They are float32 on the CPU, whatever torch's defaults are: to be moved to their device, so that
    the same seed means the same weights there.
    """
    with torch.random.fork_rng(devices=[]), float32_on_cpu():
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def float32_on_cpu() -> Iterator[None]:
    """Tensors made in this block without a dtype or device get these, not the process's defaults."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)


def torch_dtype(compute_dtype: ComputeDtype) -> torch.dtype | None:
    """What the ops call ``compute_dtype``; None is their word for the weights' own."""
    return torch.bfloat16 if compute_dtype == "bfloat16" else None
