"""Packed copies of weights: kept while nothing changes, never stale when anything does."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_script
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _native

SCHEDULE = DiffusionSchedule.linear(5)


class Op:
    """An op on one network, which takes one pack, and fixed inputs."""

    made = itertools.count(1)

    def __init__(self, network: torch.nn.Module, call: Callable[[str], Tensor]) -> None:
        self.network, self.call = network.requires_grad_(False), call
        # No two are alike, so that none finds the pack of one that lay there before.
        unique = 1e-4 * next(self.made)
        for parameter in network.parameters():
            parameter.add_(unique)


def chain() -> Op:
    denoiser = nn.Denoiser(5, 64, hidden_dim=64, hidden_layers=2)
    state, x, noise = torch.randn(9, 5), torch.randn(9, 64), torch.randn(5, 9, 64)
    return Op(
        denoiser,
        lambda backend: ops.reverse_diffusion(
            denoiser, SCHEDULE, state, x_init=x, noise=noise, clip=4.0, backend=backend
        ),
    )


def ascent() -> Op:
    critic = nn.TwinCritic(5, 64, hidden_dim=64, hidden_layers=2)
    state, action = torch.randn(9, 5), torch.rand(9, 64)
    return Op(
        critic,
        lambda backend: ops.action_gradient(
            critic, state, action, optimizer="ascent", lr=5.0, steps=3, backend=backend
        ),
    )


OPS = {"reverse_diffusion": chain, "action_gradient": ascent}


def test_a_change_while_packing_goes_with_the_call() -> None:
    """A pack of weights that were changed after they had been read isn't kept as the former ones'."""
    weight = torch.randn(512, 512) / 512**0.5
    weights, biases = [weight] * 4, [torch.zeros(512)] * 4
    x, activations = torch.randn(1, 512), ["relu"] * 3 + ["identity"]

    def call(backend: str = "cpu") -> Tensor:
        return ops.mlp(x, weights, biases, activations, backend=backend)

    for i in range(200):  # without the second look some 30 of these were wrong
        weight.mul_(1.0001)
        before = weight.clone()
        caller = threading.Thread(target=call)
        caller.start()
        time.sleep(1e-5 * (i % 100))
        weight.zero_()
        caller.join()
        if i % 2:  # nor as the later ones'
            assert torch.equal(call(), torch.zeros(1, 512))
        weight.copy_(before)
        assert torch.allclose(call(), call("reference"), atol=1e-4)


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]()


def built(function: Callable[[], object]) -> int:
    before = _native._core.packs_built()
    function()
    return _native._core.packs_built() - before


def assert_fresh(op: Op) -> None:
    """The kernels see the weights as they are now."""
    torch.testing.assert_close(op.call("cpu"), op.call("reference"), rtol=0, atol=1e-5)


# -- kept ------------------------------------------------------------------------------------------


def test_packs_are_kept_while_nothing_changes(isa: str, op: Op) -> None:
    assert built(lambda: op.call("cpu")) == 1
    assert built(lambda: [op.call("cpu") for _ in range(3)]) == 0
    with torch.no_grad():
        for parameter in op.network.parameters():
            parameter.mul_(1.0)  # a new version, the same content
    assert built(lambda: op.call("cpu")) == 0


def test_an_instruction_set_has_packs_of_its_own(op: Op) -> None:
    core = _native._core
    before = core.isa()
    try:
        for isa in core.available_isas():
            core.use_isa(isa)
            assert built(lambda: op.call("cpu")) == 1
            assert_fresh(op)
    finally:
        core.use_isa(before)


def test_as_many_networks_as_an_agent_has_stay_packed() -> None:
    """Actor, critic and both targets, called in turn."""
    networks = [chain(), ascent(), chain(), ascent()]
    for op in networks:
        op.call("cpu")
    assert built(lambda: [op.call("cpu") for _ in range(3) for op in networks]) == 0


def layer_call(out: int) -> Callable[[], object]:
    """Of a layer with 1,000 inputs, whose pack takes about as many floats."""
    x, weight, bias = torch.ones(1, 1000), torch.randn(out, 1000), torch.zeros(out)
    return lambda: ops.rff_features(x, weight, bias, backend="cpu")


def test_any_number_of_networks_stays_packed() -> None:
    """Twin critics and their targets, ensembles, populations: as many as there is memory for."""
    calls = [layer_call(1 + n % 3) for n in range(200)]
    for call in calls:
        call()
    assert built(lambda: [call() for _ in range(2) for call in calls]) == 0


def test_packs_that_were_used_longest_ago_go(pack_budget: Callable[[int], None]) -> None:
    """Of all kinds of packs, when all together take more than their budget."""
    denoiser, critic, *layers = chain(), ascent(), *(layer_call(64) for _ in range(4))
    pack_budget(1_000_000)  # three layers of 257 kB each and the networks with 210, but not four
    for call in (lambda: critic.call("cpu"), layers[0], lambda: denoiser.call("cpu")):
        call()
    for call in layers[1:4]:
        call()
        assert built(lambda: critic.call("cpu")) == 0  # used after each
    assert built(layers[3]) == built(layers[2]) == built(layers[1]) == 0
    assert built(lambda: denoiser.call("cpu")) == 0
    assert built(layers[0]) == 1


def test_the_newest_pack_is_kept_whatever_it_takes(pack_budget: Callable[[int], None]) -> None:
    pack_budget(0)
    first, second = layer_call(64), layer_call(64)
    assert built(first) == 1
    assert built(first) == 0
    assert built(second) == 1
    assert built(first) == 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_packs_of_networks_that_are_gone_have_a_budget() -> None:
    script = """
import resource
import torch
from diffcore import ops

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def call(out):
    weight, bias = torch.ones(out, 1024), torch.ones(out)
    ops.rff_features(torch.ones(1, 1024), weight, bias, backend="cpu")
    return weight

call(1)
before = resident()
weights = [call(8192) for _ in range(20)]  # each has 32 MiB, and its pack as much
del weights
print((resident() - before) / 2**20)
"""
    result = run_script(script)
    assert result.returncode == 0, result.stderr
    assert 200 < float(result.stdout) < 320


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_reading_and_the_packing(
    isa: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    """Of weights large enough for it; nobody can tell from the result."""
    layer, x = torch.nn.Linear(331, 517), torch.randn(9, 331)
    corner = layer.weight.detach()[-1, -1]
    first = corner.clone()

    def features() -> Tensor:
        return ops.rff_features(x, layer.weight, layer.bias, backend="cpu")

    def results() -> tuple[Tensor, Tensor]:
        y = features()
        return y, torch.autograd.grad(y.sum(), layer.weight)[0]

    set_threads(threads)
    together = results()
    set_threads(1)
    assert built(features) == 0  # the fingerprint is the same
    corner.add_(1.0)
    assert built(features) == 1
    corner.copy_(first)
    assert all(map(torch.equal, together, results()))
    set_threads(threads)
    corner.add_(1.0)
    assert built(features) == 1


@torch.no_grad()
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rows", [1, 9])
def test_threads_pack_what_one_does(
    isa: str,
    teams: None,
    set_threads: Callable[[int], None],
    rows: int,
    threads: int,
    compute_dtype: torch.dtype,
) -> None:
    """A whole network in one go, with what is computed from its weights; small batches too."""
    denoiser, critic = nn.Denoiser(17, 6, 300, 2), nn.TwinCritic(17, 6, 300, 2)
    schedule = DiffusionSchedule.cosine(70)
    state, x, noise = torch.randn(rows, 17), torch.randn(rows, 6), torch.randn(70, rows, 6)

    def results(threads: int) -> list[Tensor]:
        for parameter in (*denoiser.parameters(), *critic.parameters()):
            parameter.mul_(-1.0)
        set_threads(threads)
        results: list[Tensor] = []

        def run() -> None:
            given = {"x_init": x, "noise": noise, "compute_dtype": compute_dtype}
            actions = ops.reverse_diffusion(denoiser, schedule, state, **given)
            ascended = ops.action_gradient(critic, state, actions, compute_dtype=compute_dtype)
            results.extend([actions, ascended])

        assert built(run) == 2
        return results

    expected = results(1), results(1)
    for other in expected:
        assert all(map(torch.equal, results(threads), other))


# -- never stale -----------------------------------------------------------------------------------


def negate(weight: Tensor) -> None:
    weight.neg_()


def negate_a_column(weight: Tensor) -> None:
    weight[..., 3].neg_()


def negate_two(weight: Tensor) -> None:
    """Values 64 apart, which a sum over lanes of 64 words sees together."""
    weight.view(-1)[[1, 65] if weight.numel() > 65 else [0, 1]] *= -1


def double_a_column(weight: Tensor) -> None:
    weight[..., 3].mul_(2)


def exchange_two(weight: Tensor) -> None:
    flat = weight.view(-1)
    first, last = flat[0].clone(), flat[-1].clone()
    flat[0], flat[-1] = last, first


def exchange_rows(weight: Tensor) -> None:
    weight.copy_(weight.flip(0))


def roll(weight: Tensor) -> None:
    weight.copy_(weight.roll(1, 0))


def nudge_one(weight: Tensor) -> None:
    """By the smallest step there is, in the last bit."""
    weight.view(-1)[-1:].copy_(torch.nextafter(weight.view(-1)[-1:], torch.tensor(9.0)))


CHANGES = (
    negate,
    negate_a_column,
    negate_two,
    double_a_column,
    exchange_two,
    exchange_rows,
    roll,
    nudge_one,
)


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_any_weight_is_seen(
    isa: str, op: Op, change: Callable[[Tensor], None]
) -> None:
    for parameter in op.network.parameters():
        parameter.copy_(torch.randn_like(parameter) / 8)  # biases too: zeros can't be told apart
    op.call("cpu")
    for name, parameter in op.network.named_parameters():
        if parameter.numel() == 1 and change is not nudge_one:
            continue  # nothing to exchange
        if parameter.ndim == 1 and change in (negate_a_column, double_a_column):
            continue
        before = parameter.clone()
        change(parameter)
        if torch.equal(parameter, before):  # a single row rolled or exchanged
            continue
        assert built(lambda: op.call("cpu")) == 1, name
        assert_fresh(op)


def optimiser_step(op: Op) -> None:
    op.network.requires_grad_(True)
    optimizer = torch.optim.Adam(op.network.parameters(), lr=0.1, fused=True)
    for parameter in op.network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    op.network.requires_grad_(False)


def foreach_average(op: Op) -> None:
    weights = [p.data for p in op.network.parameters()]
    torch._foreach_lerp_(weights, [torch.randn_like(w) / 8 for w in weights], 0.5)


def copy_into_data(op: Op) -> None:
    for parameter in op.network.parameters():
        parameter.data.copy_(torch.randn_like(parameter) / 8)


def write_through_numpy(op: Op) -> None:
    for parameter in op.network.parameters():
        view = parameter.numpy()
        view *= -0.5
        view += 0.01


def replace_data(op: Op) -> None:
    for parameter in op.network.parameters():
        parameter.data = torch.randn_like(parameter) / 8


def load_state_dict(op: Op) -> None:
    state = {name: torch.randn_like(v) / 8 for name, v in op.network.state_dict().items()}
    op.network.load_state_dict(state)


def exchange_layers(op: Op) -> None:
    """The same tensors in another place."""
    for mlp in op.network.children():
        if isinstance(mlp, nn.MLP) and mlp.hidden_layers == 2:
            mlp.layers[1].weight.data, mlp.layers[1].bias.data = (
                mlp.layers[1].weight.data.T.contiguous(),
                mlp.layers[1].bias.data.flip(0),
            )


@pytest.mark.parametrize(
    "change",
    [
        optimiser_step,
        foreach_average,
        copy_into_data,
        write_through_numpy,
        replace_data,
        load_state_dict,
        exchange_layers,
    ],
)
def test_weights_changed_in_any_way_are_seen(op: Op, change: Callable[[Op], None]) -> None:
    copy_into_data(op)
    before = op.call("cpu")
    for _ in range(3):
        change(op)
        after = op.call("cpu")
        assert not torch.allclose(after, before, rtol=0, atol=1e-3)
        assert_fresh(op)
        before = after


def test_new_networks_at_old_addresses() -> None:
    """Memory is given out again: an address says nothing about what lies there."""
    for _ in range(40):
        assert_fresh(chain())
        assert_fresh(ascent())


def test_the_schedule_is_part_of_a_pack() -> None:
    denoiser = nn.Denoiser(5, 3, 16).requires_grad_(False)
    state, x = torch.randn(9, 5), torch.randn(9, 3)
    longer = DiffusionSchedule.cosine(9)  # of which as many steps are at other levels
    for schedule, steps in ((SCHEDULE, 4), (SCHEDULE, 2), (longer, 2), (SCHEDULE, 3), (SCHEDULE, 4)):
        options = {"noise_scale": 0.0, "solver": schedule.solver("ddim", steps=steps)}
        native, reference = (
            ops.reverse_diffusion(denoiser, schedule, state, x_init=x, backend=b, **options)
            for b in ("cpu", "reference")
        )
        torch.testing.assert_close(native, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", ["reverse_diffusion", "action_gradient", "mlp"])
def test_activation_and_precision_are_part_of_a_pack(op: str) -> None:
    state, x = torch.randn(9, 5), torch.randn(9, 3)

    def call(module: Any, dtype: torch.dtype | None) -> torch.Tensor:
        if op == "reverse_diffusion":
            options = {"x_init": x, "noise_scale": 0.0, "compute_dtype": dtype}
            return ops.reverse_diffusion(module, SCHEDULE, state, **options)
        if op == "action_gradient":
            return ops.action_gradient(module, state, x, steps=2, compute_dtype=dtype)
        parameters = module.weights_and_biases()
        layers = parameters[::2], parameters[1::2], module.activations
        return ops.mlp(state, *layers, compute_dtype=dtype)

    def make(activation: str) -> Any:
        if op == "reverse_diffusion":
            return nn.Denoiser(5, 3, 16, activation=activation)
        if op == "action_gradient":
            return nn.TwinCritic(5, 3, 16, activation=activation)
        return nn.MLP(5, 16, 2, activation=activation)

    first, second = make("mish").requires_grad_(False), make("tanh").requires_grad_(False)
    pairs = zip(first.modules(), second.modules(), strict=True)
    for one, other in [(a, b) for a, b in pairs if isinstance(a, nn.MLP)]:
        other.layers = one.layers
    copies = []  # of other places in memory, none of which is used again
    for module in (first, second, first):
        for dtype in (None, torch.bfloat16):
            copies.append(copy.deepcopy(module))
            assert torch.equal(call(module, dtype), call(copies[-1], dtype))


def test_a_pack_outlives_a_change_while_it_is_read() -> None:
    """Another thread's call goes on with the weights it began with."""
    denoiser = nn.Denoiser(17, 6).requires_grad_(False)
    schedule, state, x = DiffusionSchedule.cosine(100), torch.randn(256, 17), torch.randn(256, 6)
    old = [p.clone() for p in denoiser.parameters()]
    new = [1.5 * p for p in old]

    def set_weights(values: list[Tensor]) -> None:
        for parameter, value in zip(denoiser.parameters(), values, strict=True):
            parameter.copy_(value)

    def call(rows: int) -> Tensor:
        return ops.reverse_diffusion(
            denoiser, schedule, state[:rows], x_init=x[:rows], noise_scale=0.0
        )

    expected_of_old = call(256)
    set_weights(new)
    expected_of_new = call(1)
    set_weights(old)

    for _ in range(5):  # on a busy machine the reader may be through before the weights change
        results: list[Tensor] = []
        set_weights(new)
        call(1)  # so that the reader packs, whichever of the last two calls left its pack
        set_weights(old)
        reader = threading.Thread(target=lambda to=results: to.append(call(256)))
        before = _native._core.packs_built()
        reader.start()
        while _native._core.packs_built() == before:
            time.sleep(0)
        # The reader has its pack and is now in the chain, for tens of milliseconds.
        set_weights(new)
        assert torch.equal(call(1), expected_of_new)
        reader.join()
        assert torch.equal(results[0], expected_of_old)
