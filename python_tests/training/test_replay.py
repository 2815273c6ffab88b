"""The replay buffer: the ring, the mask, writing back, saving."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcore.training import CheckpointError, ReplayBuffer


def rows(
    first: int, count: int, terminated: bool = False, truncated: bool = False
) -> tuple[Tensor, ...]:
    """Transitions that carry their number in every entry."""
    number = torch.arange(first, first + count, dtype=torch.float32)
    return (
        number[:, None].expand(-1, 2),
        number[:, None] / 1000,
        number,
        number[:, None].expand(-1, 2) + 0.5,
        torch.full((count,), terminated),
        torch.full((count,), truncated),
    )


def make(capacity: int = 8, bootstrap_truncated: bool = True) -> ReplayBuffer:
    return ReplayBuffer(capacity, 2, 1, bootstrap_truncated=bootstrap_truncated)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_made_in_inference_mode_is_written_outside() -> None:
    with torch.inference_mode():
        buffer = make()
    buffer.add(*rows(0, 3))
    buffer.set_best_action(torch.tensor([1]), torch.tensor([[0.5]]))
    assert buffer.sample(64, generator()).best_action.max() == 0.5


@settings(deadline=None, max_examples=50)
@given(capacity=st.integers(1, 12), counts=st.lists(st.integers(1, 12), max_size=12))
def test_keeps_the_last_transitions(capacity: int, counts: list[int]) -> None:
    buffer, expected = make(capacity), deque[int](maxlen=capacity)
    total = 0
    for count in (min(count, capacity) for count in counts):
        buffer.add(*rows(total, count))
        expected.extend(range(total, total + count))
        total += count
    assert len(buffer) == len(expected)
    if expected:
        batch = buffer.sample(500, generator())
        assert set(batch.reward.flatten().int().tolist()) <= set(expected)
        assert torch.equal(batch.state, batch.reward.expand(-1, 2))
        assert torch.equal(batch.next_state, batch.state + 0.5)
        assert torch.equal(batch.action, batch.reward / 1000)
        assert torch.equal(batch.best_action, batch.action)


def test_a_sample_reaches_every_row() -> None:
    buffer = make(8)
    buffer.add(*rows(0, 8))
    assert set(buffer.sample(500, generator()).index.tolist()) == set(range(8))


@pytest.mark.parametrize(
    ("terminated", "truncated", "bootstrap_truncated", "mask"),
    [
        (False, False, True, 1.0),
        (False, False, False, 1.0),
        (True, False, True, 0.0),
        (True, False, False, 0.0),
        (False, True, True, 1.0),
        (False, True, False, 0.0),
        (True, True, True, 0.0),  # the time limit doesn't undo a terminal state
        (True, True, False, 0.0),
    ],
)
def test_mask(terminated: bool, truncated: bool, bootstrap_truncated: bool, mask: float) -> None:
    buffer = make(bootstrap_truncated=bootstrap_truncated)
    buffer.add(*rows(0, 2, terminated, truncated))
    assert torch.equal(buffer.sample(4, generator()).mask, torch.full((4, 1), mask))


def test_sampling_follows_the_generator_alone() -> None:
    buffer = make()
    buffer.add(*rows(0, 8))
    torch.manual_seed(1)
    first = buffer.sample(16, generator(3)).index
    torch.manual_seed(2)
    assert torch.equal(first, buffer.sample(16, generator(3)).index)
    assert not torch.equal(first, buffer.sample(16, generator(4)).index)


def test_written_back_actions_are_sampled() -> None:
    buffer = make()
    buffer.add(*rows(0, 8))
    index = torch.tensor([2, 5])
    buffer.set_best_action(index, torch.tensor([[0.25], [0.5]]))
    buffer.set_action(torch.tensor([2]), torch.tensor([[-1.0]]))
    batch = buffer.sample(500, generator())
    at = {int(i): n for n, i in enumerate(batch.index)}
    assert batch.best_action[at[2]] == 0.25
    assert batch.best_action[at[5]] == 0.5
    assert batch.action[at[2]] == -1.0
    assert batch.action[at[5]] == pytest.approx(0.005)


def test_a_replaced_transition_forgets_its_best_action() -> None:
    buffer = make(2)
    buffer.add(*rows(0, 2))
    buffer.set_best_action(torch.tensor([0, 1]), torch.full((2, 1), 0.75))
    buffer.add(*rows(2, 1))
    batch = buffer.sample(50, generator())
    assert torch.equal(batch.best_action[batch.index == 0], batch.action[batch.index == 0])


def test_saves_only_the_filled_part(tmp_path: Path) -> None:
    buffer = ReplayBuffer(100_000, 2, 1, bootstrap_truncated=True)
    buffer.add(*rows(0, 10))
    torch.save(buffer.state_dict(), tmp_path / "replay.pt")
    assert (tmp_path / "replay.pt").stat().st_size < 10_000


@pytest.mark.parametrize("count", [3, 8, 11])
def test_a_restored_buffer_goes_on_alike(count: int) -> None:
    buffer, other = make(), make()
    for i in range(count):
        buffer.add(*rows(i, 1))
    buffer.set_best_action(torch.tensor([1]), torch.tensor([[0.5]]))
    other.load_state_dict(buffer.state_dict())
    for each in (buffer, other):
        each.add(*rows(50, 2, terminated=True))
    a, b = buffer.sample(64, generator()), other.sample(64, generator())
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))
    assert len(buffer) == len(other)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        make(0)
    with pytest.raises(ValueError, match="empty replay buffer"):
        make().sample(1, generator())
    with pytest.raises(ValueError, match="can't store 9 transitions in a buffer of 8"):
        make().add(*rows(0, 9))
    state, action, reward, *rest = rows(0, 2)
    with pytest.raises(ValueError, match=r"reward has shape \[2, 1\], not \[2\]$"):
        make().add(state, action, reward[:, None], *rest)
    with pytest.raises(ValueError, match=r"action has shape \[2\], not \[2, 1\]$"):
        make().add(state, action[:, 0], reward, *rest)
    with pytest.raises(CheckpointError, match="holds 8 transitions, this one 4"):
        make(4).load_state_dict(make(8).state_dict())
    wider = ReplayBuffer(8, 3, 1, bootstrap_truncated=True)
    with pytest.raises(CheckpointError, match="state has shape"):
        make(8).load_state_dict(wider.state_dict())
