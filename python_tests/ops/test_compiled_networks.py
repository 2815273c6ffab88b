"""Ops that are given a network which torch.compile, or something else, has wrapped."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import run_script
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from diffcore import DiffusionSchedule, explain, nn, ops

SCHEDULE = DiffusionSchedule.cosine(5)


def refuse(graph: Any, example: Any) -> Any:
    raise AssertionError("the network was compiled, which takes a call of it")


def wrapped(network: torch.nn.Module, backend: Any = refuse) -> Any:
    return torch.compile(network, backend=backend)


def calls() -> dict[str, tuple[list[torch.nn.Module], tuple[Any, ...], dict[str, Any]]]:
    """For every op that takes networks: these, what else it takes by position, and by name."""
    state, action = torch.randn(4, 3), torch.rand(4, 2)
    denoiser, noise = nn.Denoiser(3, 2, 8), torch.randn(5, 4, 2)
    levels = {"t": torch.tensor([0, 3, 4, 1]), "noise": noise[0]}
    judges = nn.Psi(3, 2, 6, 8), nn.TwinRFFCritic(6, 8)
    for judge in judges:
        judge.requires_grad_(False)
    rows = torch.randn(4, 5), torch.randn(4, 4), torch.randn(4, 2), torch.rand(4)
    return {
        "action_gradient": ([nn.TwinCritic(3, 2, 8)], (state, action), {}),
        "denoising_loss": ([denoiser], (SCHEDULE, state, action), levels),
        "representation_loss": ([nn.MLP(5, 8, 3, 1), nn.MLP(4, 8, 3 * 2, 1)], rows, {}),
        "reverse_diffusion": ([denoiser], (SCHEDULE, state), {"x_init": action, "noise": noise}),
        "soft_value": (
            [nn.SquashedGaussian(3, 2, 8), *judges],
            (state, action, torch.tensor(0.1)),
            {},
        ),
    }


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("op", calls())
def test_one_of_ours_runs_by_its_weights(op: str) -> None:
    networks, rest, named = calls()[op]
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    results = []
    for given in (networks, [wrapped(network) for network in networks]):
        assert explain(op, *given, *rest, **named).backend == "cpu"
        result = first(getattr(ops, op)(*given, *rest, **named))
        grads = torch.autograd.grad(result.sum(), parameters) if result.requires_grad else ()
        results.append([result.detach(), *grads])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", calls())
def test_on_the_reference(op: str) -> None:
    networks, rest, named = calls()[op]
    compiled = [wrapped(network, "eager") for network in networks]
    expected = first(getattr(ops, op)(*networks, *rest, **named, backend="reference"))
    result = first(getattr(ops, op)(*compiled, *rest, **named, backend="reference"))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("op", calls())
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_averaged_ones_run_by_their_weights(op: str, backend: str) -> None:
    networks, rest, named = calls()[op]
    averaged = [AveragedModel(network) for network in networks]
    expected = first(getattr(ops, op)(*networks, *rest, **named, backend=backend))
    for given in (averaged, [wrapped(network, "eager") for network in averaged]):
        assert explain(op, *given, *rest, **named).backend == "cpu"
        result = first(getattr(ops, op)(*given, *rest, **named, backend=backend))
        torch.testing.assert_close(result, expected)


def test_averaged_ones_that_do_more_are_called() -> None:
    class Halved(AveragedModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 0.5 * super().forward(*args, **kwargs)

    networks, rest, named = calls()["denoising_loss"]
    hooked, called = AveragedModel(networks[0]), []
    hooked.register_forward_hook(lambda *_: called.append(1))
    ops.denoising_loss(hooked, *rest, **named)
    assert called == [1]
    halved = Halved(networks[0])
    assert explain("denoising_loss", halved, *rest, **named).backend == "reference"
    assert ops.denoising_loss(halved, *rest, **named) != ops.denoising_loss(hooked, *rest, **named)
    patched = AveragedModel(networks[0])
    patched.forward = halved.forward
    assert explain("denoising_loss", patched, *rest, **named).backend == "reference"


def test_compiling_warns_of_nothing() -> None:
    """What is looked up once, for instance, the compiler would say that it sees through."""
    script = """
import warnings, torch
from diffcore import ops
from diffcore.nn import MLP, TwinCritic
warnings.simplefilter("error", UserWarning)
warnings.filterwarnings("ignore", "dynamo_pgo")  # whose caches tests switch off
mlp, critic = MLP(3, 8, 2, 1), TwinCritic(3, 2, 8).requires_grad_(False)
torch.compile(mlp, backend="eager")(torch.ones(4, 3))
ascent = torch.compile(lambda s, a: ops.action_gradient(critic, s, a, steps=2), backend="eager")
print(ascent(torch.ones(4, 3), torch.zeros(4, 2)).shape)
"""
    done = run_script(script)
    assert done.stdout == "torch.Size([4, 2])\n", done.stderr


@pytest.mark.parametrize("op", calls())
def test_other_wrappers_are_named(op: str) -> None:
    """They may do more, as DistributedDataParallel does, whose calls see to the gradients."""
    networks, rest, named = calls()[op]
    given = [torch.nn.DataParallel(network) for network in networks]
    expected = r"wrapped in DataParallel: pass its \.module"
    if op in ("representation_loss", "soft_value"):
        with pytest.raises(TypeError, match=f"^(psi|policy): .* {expected}"):
            getattr(ops, op)(*given, *rest, **named)
        return
    assert re.search(expected, explain(op, *given, *rest, **named).passed_over["cpu"])
    if op == "reverse_diffusion":
        with pytest.raises(ValueError, match=f"^x_init: .* {expected}"):
            ops.reverse_diffusion(given[0], *rest)


def test_draws_like_the_network_itself() -> None:
    """A foreign callable would need x_init."""
    denoiser, state = nn.Denoiser(3, 2, 8).double(), torch.randn(4, 3).double()
    with torch.no_grad():
        drawn = [
            ops.reverse_diffusion(
                network, SCHEDULE, state, generator=torch.Generator().manual_seed(1)
            )
            for network in (denoiser, wrapped(denoiser, "eager"))
        ]
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize(
    "register",
    [
        lambda module, hook: module.register_forward_hook(hook),
        lambda module, hook: module.register_forward_pre_hook(hook),
    ],
)
def test_hooks_of_the_wrapper_are_called(register: Callable[..., Any]) -> None:
    networks, rest, named = calls()["denoising_loss"]
    compiled, called = wrapped(networks[0], "eager"), []
    handle = register(compiled, lambda *_: called.append(1))
    assert explain("denoising_loss", compiled, *rest, **named).backend == "reference"
    ops.denoising_loss(compiled, *rest, **named)
    assert called == [1]
    handle.remove()
    assert explain("denoising_loss", compiled, *rest, **named).backend == "cpu"


def test_networks_that_do_more_are_called_compiled() -> None:
    class Scaled(nn.Denoiser):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    graphs = []

    def counted(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    def foreign(x: Tensor, state: Tensor, t: Tensor) -> Tensor:
        return 2 * x

    _, rest, named = calls()["denoising_loss"]
    for network in (Scaled(3, 2, 8), foreign):
        graphs.clear()
        compiled = torch.compile(network, backend=counted)
        assert explain("denoising_loss", compiled, *rest, **named).backend == "reference"
        result = ops.denoising_loss(compiled, *rest, **named)
        assert graphs
        torch.testing.assert_close(result, ops.denoising_loss(network, *rest, **named))


def test_within_a_compiled_function() -> None:
    networks, (schedule, state, action), named = calls()["denoising_loss"]
    compiled = wrapped(networks[0])

    def loss(state: Tensor, action: Tensor) -> Tensor:
        return ops.denoising_loss(compiled, schedule, state, action, **named)

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(state, action), loss(state, action))


def test_one_of_another_kind_is_refused() -> None:
    networks, rest, _ = calls()["representation_loss"]
    with pytest.raises(TypeError, match="^psi: expected a diffcore.nn.MLP, got OptimizedModule"):
        ops.representation_loss(wrapped(torch.nn.Linear(5, 3)), networks[1], *rest)


def test_while_another_thread_imports_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the module is there, and what it defines isn't yet."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", types.ModuleType("torch._dynamo"))
    schedule, x, state = DiffusionSchedule.linear(3), torch.randn(4, 2), torch.randn(4, 3)
    result = ops.reverse_diffusion(lambda x, state, t: x, schedule, state, x_init=x)
    assert result.shape == x.shape
