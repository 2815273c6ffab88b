"""The networks: layout of parameters, values, initial weights, errors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import golden_critic, load_golden, plain_critic, plain_denoiser, plain_mlp
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import diffcore
from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _backends, _dispatch

ACTIVATIONS = ("identity", "relu", "elu", "silu", "gelu", "mish", "tanh", "sin", "cos")


def shapes(module: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters()]


# -- layout ----------------------------------------------------------------------------------------


def test_parameters_come_from_input_to_output() -> None:
    assert shapes(nn.MLP(3, 8, 2, hidden_layers=2)) == [(8, 3), (8,), (8, 8), (8,), (2, 8), (2,)]
    denoiser = nn.Denoiser(5, 3, 8, hidden_layers=2, time_dim=4)
    time = [(8, 4), (8,), (4, 8), (4,)]
    trunk = [(8, 3 + 4 + 5), (8,), (8, 8), (8,), (3, 8), (3,)]
    assert shapes(denoiser) == time + trunk
    q = [(8, 5 + 3), (8,), (8, 8), (8,), (1, 8), (1,)]
    assert shapes(nn.TwinCritic(5, 3, 8, hidden_layers=2)) == q + q


def test_defaults_are_the_papers() -> None:
    assert shapes(nn.Denoiser(17, 6))[4:] == [
        (256, 6 + 32 + 17),
        (256,),
        (256, 256),
        (256,),
        (256, 256),
        (256,),
        (6, 256),
        (6,),
    ]
    assert len(shapes(nn.TwinCritic(17, 6))) == 2 * 2 * 4
    assert nn.Denoiser(17, 6).activation == nn.TwinCritic(17, 6).activation == "mish"


@pytest.mark.parametrize("in_dim", [4, 100])
def test_initial_weights(in_dim: int) -> None:
    """Normal of standard deviation 1 / (2 sqrt(fan_in)), truncated at two of them; biases 0."""
    layer = nn.MLP(in_dim, 20_000 // in_dim, 1, 1).layers[0]
    std = 1 / (2 * math.sqrt(in_dim))
    assert layer.weight.abs().max() <= 2 * std
    # The truncated normal's own standard deviation is 0.880 of the normal's.
    assert layer.weight.std().item() == pytest.approx(0.880 * std, rel=0.03)
    assert abs(layer.weight.mean().item()) < 4 * std / math.sqrt(20_000)
    assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_state_dict_round_trip() -> None:
    for build in (lambda: nn.Denoiser(5, 3, 8), lambda: nn.TwinCritic(5, 3, 8)):
        first, second = build(), build()
        second.load_state_dict(first.state_dict())
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)


def test_sizes_from_numpy() -> None:
    two, three = np.int64(2), np.prod((3,))
    networks = [
        nn.MLP(two, three, two, hidden_layers=two),
        nn.Denoiser(three, two, three, two, time_dim=two),
        nn.TwinCritic(three, two, three, two),
        nn.SquashedGaussian(three, two, three, two, log_std_bounds=(np.float32(-5), np.int32(2))),
        nn.Psi(three, two, three, three),
        nn.Zeta(three, two, three, time_dim=two),
        nn.TwinRFFCritic(three, three),
        nn.RandomFourierFeatures(three, two, lengthscale=np.float32(2)),
        nn.Temperature(np.float32(0.1)),
    ]
    for network in networks:
        for module in network.modules():
            for name, value in vars(module).items():
                assert not isinstance(value, np.generic), (type(module).__name__, name)
    state, noise = torch.randn(4, 3), torch.randn(4, 2)
    policy = nn.SquashedGaussian(3, 2, 8, log_std_bounds=(np.float32(-5), np.float32(2)))
    assert policy.sample(state, noise)[0].shape == (4, 2)
    for value in (True, np.bool_(True), np.float64(3.0), torch.tensor(3)):
        with pytest.raises(TypeError, match="^state_dim: expected an integer"):
            nn.Denoiser(value, 2)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 4, 32])
def test_time_embedding(dim: int) -> None:
    t = torch.tensor([0, 1, 7, 999])
    embedding = nn.time_embedding(t, dim)
    assert embedding.dtype == torch.float64
    assert embedding.shape == (4, dim)
    half = dim // 2
    for row, step in enumerate(t.tolist()):
        for i in range(half):
            angle = step * 10000 ** (-i / max(half - 1, 1))
            assert embedding[row, i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert embedding[row, half + i].item() == pytest.approx(math.cos(angle), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_plain_pytorch(dtype: torch.dtype) -> None:
    x, state = torch.randn(9, 3, dtype=dtype), torch.randn(9, 5, dtype=dtype)
    t = torch.arange(9)
    denoiser, critic = nn.Denoiser(5, 3, 8).to(dtype), nn.TwinCritic(5, 3, 8).to(dtype)
    torch.testing.assert_close(
        denoiser(x, state, t), plain_denoiser(denoiser, dtype)(x, state, t), rtol=1e-5, atol=1e-6
    )
    for q, expected in zip(critic(state, x), plain_critic(critic, dtype)(state, x), strict=True):
        assert q.shape == (9, 1)
        torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["halfcheetah", "pendulum"])
def test_golden_critic(name: str) -> None:
    golden = load_golden(f"dipo_action_gradient_{name}")
    q1, q2 = golden_critic(golden)(golden["state"], golden["action"])
    torch.testing.assert_close(q1, golden["q1"], rtol=0, atol=1e-5)
    torch.testing.assert_close(q2, golden["q2"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_on_every_backend(backend: str, activation: str) -> None:
    mlp = nn.MLP(3, 8, 2, activation=activation)
    x = torch.randn(9, 3)
    function = getattr(torch.nn.functional, activation, None) or getattr(
        torch, activation, lambda z: z
    )
    expected = x
    for i, layer in enumerate(mlp.layers):
        expected = layer(expected) if i == 3 else function(layer(expected))
    torch.testing.assert_close(mlp(x, backend=backend), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (9, 3), (4, 9, 3), (2, 0, 3)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    mlp, x = nn.MLP(3, 8, 2), torch.randn(shape)
    parameters = list(mlp.parameters())
    y = mlp(x)
    assert y.shape == (*shape[:-1], 2)
    torch.testing.assert_close(y, plain_mlp(x, parameters, "mish"), rtol=1e-5, atol=1e-6)


# -- in training -----------------------------------------------------------------------------------


def test_gradients_reach_every_parameter() -> None:
    denoiser, critic = nn.Denoiser(5, 3, 8), nn.TwinCritic(5, 3, 8)
    state, t = torch.randn(9, 5), torch.arange(9)
    action = denoiser(torch.randn(9, 3), state, t)
    torch.cat(critic(state, action)).square().sum().backward()
    for parameter in (*denoiser.parameters(), *critic.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("backend", [None, "reference"])
def test_values_may_be_changed_in_place(backend: str | None) -> None:
    """One by one, as in a plain critic; and what autograd does for it stays one node."""
    critic, critics = nn.TwinCritic(5, 3, 8), nn.TwinRFFCritic(5, 8)
    state, action = torch.randn(9, 5), torch.randn(9, 3)
    for call in (
        lambda: critic(state, action, backend=backend),
        lambda: critics(state, backend=backend),
    ):
        q1, q2 = call()
        expected = [q.detach().clone() for q in (q1, q2)]
        assert q1.grad_fn is q2.grad_fn
        q1 -= q2.detach()
        q2 *= 2.0
        (q1 + q2).sum().backward()
        assert torch.equal(q1, expected[0] - expected[1])
        assert torch.equal(q2, 2 * expected[1])
    with torch.no_grad():
        q1, q2 = critic(state, action)
        q1 -= q2

    def doubled(state: Tensor, action: Tensor) -> Tensor:
        q1, _ = critic(state, action, backend=backend)
        q1 *= 2
        return q1

    def of_all(action: Tensor) -> Tensor:
        return torch.func.vmap(doubled)(state, action).sum()

    twice = torch.func.grad(of_all)(action)
    once = torch.func.grad(lambda a: critic(state, a, backend=backend)[0].sum())(action)
    torch.testing.assert_close(twice, 2 * once)


def test_ensemble_with_vmap() -> None:
    critics = [nn.TwinCritic(5, 3, 8) for _ in range(3)]
    state, action = torch.randn(9, 5), torch.randn(9, 3)
    stacked, _ = torch.func.stack_module_state(critics)

    def value(parameters: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(critics[0], parameters, (state, action))

    q1, q2 = torch.vmap(value)(stacked)
    for i, critic in enumerate(critics):
        torch.testing.assert_close(q1[i], critic(state, action)[0])
        torch.testing.assert_close(q2[i], critic(state, action)[1])


LEVELS = torch.zeros(2, dtype=torch.int64)
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "MLP": (nn.MLP(5, 8, 3), (torch.ones(5),)),
    "TwinCritic": (nn.TwinCritic(5, 3, 8), (torch.ones(5), torch.ones(3))),
    "Psi": (nn.Psi(5, 3, 4, 8), (torch.ones(5), torch.ones(3))),
    "TwinRFFCritic": (nn.TwinRFFCritic(4, 8), (torch.ones(4),)),
    "SquashedGaussian": (nn.SquashedGaussian(5, 3, 8).sample, (torch.ones(5), torch.ones(3))),
    "Denoiser": (nn.Denoiser(5, 3, 8), (torch.ones(2, 3), torch.ones(2, 5), LEVELS)),
    "Zeta": (nn.Zeta(5, 4, 8), (torch.ones(2, 5), torch.ones(2, 1), LEVELS)),
}


@pytest.mark.parametrize("name", CALLS)
def test_vmap_over_an_empty_batch(name: str) -> None:
    call, inputs = CALLS[name]

    def results(elements: int) -> tuple[Tensor, ...]:
        mapped = torch.func.vmap(call)(*(x.expand(elements, *x.shape) for x in inputs))
        return mapped if isinstance(mapped, tuple) else (mapped,)

    for one, none in zip(results(1), results(0), strict=True):
        assert none.shape == (0, *one.shape[1:])


def test_compile() -> None:
    denoiser = nn.Denoiser(5, 3, 8)
    inputs = torch.randn(9, 3), torch.randn(9, 5), torch.arange(9)
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), denoiser(*inputs))


def test_autocast() -> None:
    """Layers before hand on bfloat16; the kernels go on in float32."""
    critic, state, action = nn.TwinCritic(5, 3, 8), torch.randn(9, 5), torch.randn(9, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q1, _ = critic(state.bfloat16(), action.bfloat16())
    assert q1.dtype == torch.float32
    torch.testing.assert_close(q1, critic(state.bfloat16().float(), action.bfloat16().float())[0])


def test_compute_dtype() -> None:
    """A module's calls, forward and backward, are the op's in its precision; weights stay float32."""
    critic = nn.TwinCritic(5, 3, 40, compute_dtype=torch.bfloat16)
    state, action = torch.randn(9, 5), torch.randn(9, 3)
    networks = [q.weights_and_biases() for q in (critic.q1, critic.q2)]
    expected = ops.mlp_ensemble(
        torch.cat([state, action], 1),
        networks,
        critic.q1.activations,
        compute_dtype=torch.bfloat16,
    )
    values = critic(state, action)
    assert all(map(torch.equal, values, expected))
    exact = ops.mlp_ensemble(torch.cat([state, action], 1), networks, critic.q1.activations)
    assert not torch.equal(values[0], exact[0])
    target = torch.randn(9, 1)
    arguments = (torch.cat([state, action], 1), networks, critic.q1.activations, target)
    loss, _ = ops.critic_loss(*arguments, compute_dtype=torch.bfloat16)
    assert torch.equal(critic.loss(state, action, target)[0], loss)
    assert not torch.equal(ops.critic_loss(*arguments)[0], loss)
    sum(values).sum().backward()
    assert {p.grad.dtype for p in critic.parameters()} == {torch.float32}
    network = nn.MLP(5, 40, 2, 1, compute_dtype=torch.bfloat16)
    weight, bias, *_ = network.weights_and_biases()
    hidden = ops.mlp(state, [weight], [bias], ["mish"], compute_dtype=torch.bfloat16)
    assert torch.equal(network.hidden(state), hidden)
    with pytest.raises(ValueError, match="compute_dtype: expected None"):
        nn.MLP(5, 40, 2, compute_dtype=torch.float64)


S, A, T = torch.randn(9, 5), torch.randn(9, 3), torch.arange(9)
PSI, TARGET, LEVEL = torch.randn(9, 6), torch.randn(9, 1), torch.rand(9, 1)

#: Calls that have a backend: a module, what to call of it, and with what.
WITH_BACKENDS: dict[str, tuple[Callable[[], Any], str, tuple[Tensor, ...]]] = {
    "mlp": (lambda: nn.MLP(5, 8, 2), "forward", (S,)),
    "hidden": (lambda: nn.MLP(5, 8, 2), "hidden", (S,)),
    "denoiser": (lambda: nn.Denoiser(5, 3, 8), "forward", (A, S, T)),
    "critic": (lambda: nn.TwinCritic(5, 3, 8), "forward", (S, A)),
    "critic's loss": (lambda: nn.TwinCritic(5, 3, 8), "loss", (S, A, TARGET)),
    "policy": (lambda: nn.SquashedGaussian(5, 3, 8), "forward", (S,)),
    "sample": (lambda: nn.SquashedGaussian(5, 3, 8), "sample", (S, A)),
    "psi": (lambda: nn.Psi(5, 3, 6, 8), "forward", (S, A)),
    "zeta": (lambda: nn.Zeta(5, 6, 8, conditioning="time_embedding"), "forward", (S, LEVEL, T)),
    "fourier": (lambda: nn.RandomFourierFeatures(5, 8), "forward", (S,)),
    "rff critic": (lambda: nn.RFFCritic(6, 8, "gaussian"), "forward", (PSI,)),
    "rff critics": (lambda: nn.TwinRFFCritic(6, 8), "forward", (PSI,)),
    "rff critics apart": (lambda: nn.TwinRFFCritic(6, 8, "gaussian"), "forward", (PSI,)),
    "rff critics' loss": (lambda: nn.TwinRFFCritic(6, 8), "loss", (PSI, TARGET)),
    "rff critics' loss apart": (lambda: nn.TwinRFFCritic(6, 8, "gaussian"), "loss", (PSI, TARGET)),
    "phi": (lambda: nn.TwinRFFCritic(6, 8, "gaussian"), "phi", (PSI,)),
}


@pytest.mark.parametrize("name", WITH_BACKENDS)
def test_every_op_of_a_call_runs_on_its_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, forced = _dispatch.choose, []

    def watched(op: str, support: Any, backend: str | None) -> str:
        forced.append(backend)
        return choose(op, support, backend)

    monkeypatch.setattr(_dispatch, "choose", watched)
    monkeypatch.setattr(_backends, "may_go_straight", lambda *_: False)  # past choose
    make, method, arguments = WITH_BACKENDS[name]
    getattr(make(), method)(*arguments, backend="reference")
    assert {*forced} == {"reference"}


def test_inference_mode_leaves_nothing_behind() -> None:
    denoiser, t = nn.Denoiser(5, 3, 8, time_dim=6), torch.arange(9)
    with torch.inference_mode():
        denoiser(torch.randn(9, 3), torch.randn(9, 5), t)
    denoiser(torch.randn(9, 3), torch.randn(9, 5), t).sum().backward()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "arguments", "error", "message"),
    [
        (nn.MLP, {"in_dim": 0}, ValueError, "^in_dim: expected at least 1, got 0"),
        (nn.MLP, {"hidden_dim": -8}, ValueError, "^hidden_dim: expected at least 1, got -8"),
        (nn.MLP, {"out_dim": 2.0}, TypeError, "^out_dim: expected an integer, got float"),
        (nn.MLP, {"hidden_layers": 0}, ValueError, "^hidden_layers: expected at least 1, got 0"),
        (nn.MLP, {"activation": "swish"}, ValueError, "^activation: expected one of .*'swish'"),
        (nn.Denoiser, {"state_dim": 0}, ValueError, "^state_dim: "),
        (nn.Denoiser, {"action_dim": 0}, ValueError, "^action_dim: "),
        (nn.Denoiser, {"hidden_dim": 0}, ValueError, "^hidden_dim: "),
        (nn.Denoiser, {"hidden_layers": True}, TypeError, "^hidden_layers: .* got bool"),
        (nn.Denoiser, {"time_dim": 7}, ValueError, "^time_dim: expected an even number, got 7"),
        (nn.Denoiser, {"time_dim": 0}, ValueError, "^time_dim: "),
        (nn.Denoiser, {"activation": None}, ValueError, "^activation: "),
        (nn.TwinCritic, {"state_dim": -1}, ValueError, "^state_dim: "),
        (nn.TwinCritic, {"action_dim": "6"}, TypeError, "^action_dim: .* got str"),
        (nn.TwinCritic, {"activation": "Mish"}, ValueError, "^activation: .*'Mish'"),
    ],
)
def test_bad_sizes(
    build: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    needed = {
        nn.MLP: {"in_dim": 3, "hidden_dim": 8, "out_dim": 2},
        nn.Denoiser: {"state_dim": 5, "action_dim": 3},
        nn.TwinCritic: {"state_dim": 5, "action_dim": 3},
    }
    with pytest.raises(error, match=message):
        build(**{**needed[build], **arguments})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.MLP(3, 8, 2)(torch.ones(9, 4)), ValueError, r"^x: .* \[..., 3\], got \[9, 4\]"),
        (
            lambda: nn.MLP(3, 8, 2)(torch.ones(())),
            ValueError,
            r"^x: expected shape \[..., 3\], got",
        ),
        (lambda: nn.MLP(3, 8, 2)([1.0] * 3), TypeError, "^x: expected a tensor, got list"),
        (lambda: nn.MLP(3, 8, 2)(torch.ones(9, 3).double()), TypeError, "torch.float64"),
        (lambda: nn.MLP(3, 8, 2)(torch.ones(9, 3).long()), TypeError, "^x: .* got torch.int64"),
        (lambda: nn.MLP(3, 8, 2)(torch.ones(9, 3), backend="gpu"), ValueError, "^backend: "),
        (lambda: denoise(torch.ones(9, 2), torch.ones(9, 5)), ValueError, "^x: .*3], got"),
        (lambda: denoise(torch.ones(9, 3), torch.ones(9, 6)), ValueError, "^state: .*5], got"),
        (lambda: value(torch.ones(9, 6), torch.ones(9, 3)), ValueError, "^state: .*5], got"),
        (lambda: value(torch.ones(9, 5), torch.ones(9, 2)), ValueError, "^action: .*3], got"),
        (lambda: value(torch.ones(9, 5), None), TypeError, "^action: expected a tensor"),
    ],
)
def test_bad_inputs(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def denoise(x: Any, state: Any, t: Any = None) -> Tensor:
    return nn.Denoiser(5, 3, 8)(x, state, torch.arange(9) if t is None else t)


S, A = torch.ones(9, 5), torch.ones(9, 3)


@pytest.mark.parametrize("change", ["float64", "float32", "rows", "kind"])
@pytest.mark.parametrize("argument", range(2))
@pytest.mark.parametrize("module", ["critic", "loss", "denoiser", "policy", "psi", "mlp", "twins"])
def test_bad_inputs_are_named(module: str, argument: int, change: str) -> None:
    """By the module's own names for them, with what came and what was expected."""
    policy, psi, rff = nn.SquashedGaussian(5, 3, 8), nn.Psi(5, 3, 6, 8), nn.TwinRFFCritic(5, 8)
    critic, denoiser, mlp = nn.TwinCritic(5, 3, 8), nn.Denoiser(5, 3, 8), nn.MLP(5, 8, 3)
    kind, names, call = {
        "critic": (critic, ["state", "action"], critic),
        "loss": (critic, ["state", "action"], lambda s, a: critic.loss(s, a, torch.ones(9, 1))),
        "denoiser": (denoiser, ["state", "x"], lambda s, x: denoiser(x, s, torch.arange(9))),
        "policy": (policy, ["state", "noise"], policy.sample),
        "psi": (psi, ["state", "action"], psi),
        "mlp": (mlp, ["x", "x"], lambda x, _: mlp(x)),
        "twins": (rff, ["psi", "psi"], lambda x, _: rff(x)),
    }[module]
    if module in ("mlp", "twins") and (argument or change == "rows"):
        pytest.skip("it has one input")
    given, message = [S, A], "expected torch.float32 .*, got torch.float64"
    name = names[argument]
    if change == "float64":
        given[argument] = given[argument].double()
    elif change == "float32":
        kind.double()
        given[1 - argument] = given[1 - argument].double()
        message = "expected torch.float64 .*, got torch.float32"
    elif change == "rows":
        given[argument] = given[argument][:2]
        message = "expected shape .*, got "
        name = "(state|action|noise|x)"
    else:
        given[argument] = given[argument].long()
        message = "expected a floating-point tensor, got torch.int64"
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {message}"):
        call(*given)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (3, TypeError, "^t: expected an integer tensor, got int"),
        (torch.tensor(3), ValueError, r"^t: expected shape \[9\], got \[\]"),
        (torch.tensor([3]), ValueError, r"^t: expected shape \[9\], got \[1\]"),
        (torch.ones(9), TypeError, "^t: expected an integer tensor, got torch.float32"),
        (torch.ones(9, dtype=torch.bool), TypeError, "^t: .* got torch.bool"),
        ([3] * 9, TypeError, "^t: expected an integer tensor, got list"),
    ],
)
def test_bad_levels_are_named(t: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        denoise(A, S, t)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(denoise_alike(torch.arange(9).to(dtype)), denoise_alike(torch.arange(9)))


def denoise_alike(t: Tensor) -> Tensor:
    torch.manual_seed(0)
    return denoise(A, S, t)


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (None, TypeError, "^noise: expected a tensor, got NoneType"),
        (torch.ones(9, 2), ValueError, r"^noise: expected shape \[\.\.\., 3\], got \[9, 2\]"),
        (torch.ones(4, 3), ValueError, r"^noise: expected shape \[9, 3\], got \[4, 3\]"),
        (torch.ones(2, 9, 3), ValueError, r"^noise: expected shape \[9, 3\], got \[2, 9, 3\]"),
    ],
)
def test_bad_noise_is_named(noise: Any, error: type[Exception], message: str) -> None:
    policy = nn.SquashedGaussian(5, 3, 8)
    with pytest.raises(error, match=message):
        policy.sample(S, noise)
    policy.register_forward_hook(lambda *_: None)
    with pytest.raises(error, match=message):
        policy.sample(S, noise)
    for shape in ((3,), (1, 3), (9, 3)):
        action, log_prob = policy.sample(S, torch.ones(shape))
        assert action.shape == (9, 3)
        assert log_prob.shape == (9, 1)


def value(state: Any, action: Any) -> Any:
    return nn.TwinCritic(5, 3, 8)(state, action)


# -- networks that are more than their weights -------------------------------------------------------

SCHEDULE = DiffusionSchedule.linear(4)


class Halved(nn.Denoiser):
    """A denoiser with a forward of its own, which knows nothing of backends."""

    def forward(self, x: Tensor, state: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, state, t) * 0.5


class Pessimist(nn.TwinCritic):
    """A critic with a forward of its own."""

    def forward(  # type: ignore[override]
        self, state: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        q1, q2 = super().forward(state, action)
        return -q1, -q2


def chain(denoiser: nn.Denoiser | Callable[..., Tensor], **settings: Any) -> Tensor:
    settings = {"x_init": torch.full((3, 2), 0.3), "noise_scale": 0.0, **settings}
    return ops.reverse_diffusion(denoiser, SCHEDULE, torch.ones(3, 5), **settings)


def score(denoiser: nn.Denoiser | Callable[..., Tensor]) -> Tensor:
    t, noise = torch.tensor([0, 1, 3]), torch.full((3, 2), 0.2)
    state, action = torch.ones(3, 5), torch.zeros(3, 2)
    return ops.denoising_loss(denoiser, SCHEDULE, state, action, t=t, noise=noise)


def climb(critic: Any) -> Tensor:
    return ops.action_gradient(critic, torch.ones(3, 5), torch.zeros(3, 2), steps=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_subclass_is_called(dtype: torch.dtype) -> None:
    denoiser, critic = Halved(5, 2, 8), Pessimist(5, 2, 8)
    plain = functools.partial(Halved.forward, denoiser)
    assert torch.allclose(chain(denoiser), chain(plain), atol=1e-6)
    assert torch.allclose(score(denoiser), score(plain), atol=1e-6)
    assert torch.allclose(climb(critic), climb(functools.partial(Pessimist.forward, critic)))
    answer = diffcore.explain("reverse_diffusion", denoiser, SCHEDULE, torch.ones(3, 5))
    assert answer.backend == "reference"
    assert answer.passed_over["cpu"].endswith("Halved has a forward that isn't Denoiser's")
    assert chain(denoiser, x_init=None).shape == (3, 2)  # the kernel's own start
    x, state, noise = (torch.ones(3, n, dtype=dtype) for n in (2, 5, 2))
    t = torch.tensor([0, 1, 3])
    ops.reverse_diffusion(denoiser.to(dtype), SCHEDULE, state, x_init=x)
    ops.denoising_loss(denoiser, SCHEDULE, state, x, t=t, noise=noise)


@pytest.mark.parametrize("place", ["denoiser", "time_mlp", "trunk"])
def test_hooks_on_a_denoiser_run(place: str) -> None:
    denoiser = nn.Denoiser(5, 2, 8)
    before, loss = chain(denoiser), score(denoiser)
    module = denoiser if place == "denoiser" else getattr(denoiser, place)
    with module.register_forward_hook(lambda module, inputs, output: output + 1.0):
        assert not torch.allclose(chain(denoiser), before)
        assert not torch.allclose(score(denoiser), loss)
    assert torch.equal(chain(denoiser), before)


@pytest.mark.parametrize("place", ["critic", "q1"])
def test_hooks_on_a_critic_run(place: str) -> None:
    critic = nn.TwinCritic(5, 2, 8)
    before, values = climb(critic), critic(torch.ones(3, 5), torch.zeros(3, 2))
    calls: list[str] = []
    module = critic if place == "critic" else critic.q1
    with module.register_forward_pre_hook(lambda module, inputs: calls.append(place)):
        assert torch.allclose(climb(critic), before, atol=1e-6)
        again = critic(torch.ones(3, 5), torch.zeros(3, 2))
        assert len(calls) == 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values, again, strict=True))


def test_hooks_for_all_modules_run() -> None:
    denoiser, critic, mlp = nn.Denoiser(5, 2, 8), nn.TwinCritic(5, 2, 8), nn.MLP(5, 8, 2)
    state, action, target = torch.ones(3, 5), torch.zeros(3, 2), torch.zeros(3, 1)
    calls: list[type] = []

    def met(run: Callable[[], Any]) -> set[type]:
        """What kinds of modules were called."""
        before = run()
        hook = register_module_forward_hook(lambda module, *_: calls.append(type(module)))
        calls.clear()
        try:
            after = run()
        finally:
            hook.remove()
        assert torch.allclose(first(before), first(after), atol=1e-6)
        return {*calls}

    assert met(lambda: chain(denoiser)) == {nn.Denoiser, nn.MLP}
    assert met(lambda: score(denoiser)) == {nn.Denoiser, nn.MLP}
    assert met(lambda: climb(critic)) == {nn.TwinCritic, nn.MLP}
    assert met(lambda: critic(state, action)) == {nn.TwinCritic, nn.MLP}
    assert met(lambda: critic.loss(state, action, target)) == {nn.TwinCritic, nn.MLP}
    assert met(lambda: mlp(state)) == {nn.MLP}
    policy = nn.SquashedGaussian(5, 2, 8)
    assert met(lambda: policy.sample(state, action)) == {nn.SquashedGaussian, nn.MLP}
    psi, critics = nn.Psi(5, 2, 6, 8), nn.TwinRFFCritic(6, 8)
    value = functools.partial(ops.soft_value, policy, psi, critics, state, action)
    parts = {nn.SquashedGaussian, nn.Psi, nn.TwinRFFCritic, nn.RFFCritic, nn.MLP}
    assert met(lambda: value(torch.tensor(0.1))) == parts
    with register_module_forward_hook(lambda *_: None):
        answer = diffcore.explain("reverse_diffusion", denoiser, SCHEDULE, state)
    assert answer.passed_over["cpu"].endswith("called, since hooks are registered for all modules")


def test_hooks_for_all_modules_leave_ops_of_weights_alone() -> None:
    """They never call the networks that they are given."""
    psi, zeta = nn.MLP(5, 8, 3, 1), nn.MLP(4, 8, 3 * 2, 1)
    rows = torch.randn(4, 5), torch.randn(4, 4), torch.randn(4, 2), torch.rand(4)
    expected = ops.representation_loss(psi, zeta, *rows)
    with register_module_forward_hook(lambda *_: None):
        assert torch.equal(ops.representation_loss(psi, zeta, *rows), expected)
        assert diffcore.explain("representation_loss", psi, zeta, *rows).backend == "cpu"


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def replaced(index: int, layer: torch.nn.Module) -> Callable[[nn.MLP], None]:
    def replace(network: nn.MLP) -> None:
        network.layers[index] = layer

    return replace


def widened(network: nn.MLP) -> None:
    network.layers[1].weight.data = torch.randn(64, 8)


def short_bias(network: nn.MLP) -> None:
    network.layers[1].bias.data = torch.zeros(3)


class Silent(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (replaced(1, torch.nn.Linear(4096, 8)), ValueError, r"layers\[1\].weight: .*\[out, 8\]"),
        (replaced(1, torch.nn.Linear(8, 64)), ValueError, r"layers\[2\].weight: .*\[out, 64\]"),
        (widened, ValueError, r"layers\[1\].bias: expected shape \[64\], got \[8\]"),
        (replaced(0, torch.nn.Linear(30, 8)), ValueError, "expected .* inputs, got layers with 30"),
        (replaced(3, torch.nn.Linear(8, 5)), ValueError, "expected .* outputs, got layers with 5"),
        (replaced(1, torch.nn.Linear(8, 8, bias=False)), TypeError, "a bias, got one without"),
        (short_bias, ValueError, r"layers\[1\].bias: expected shape \[8\], got \[3\]"),
        (
            lambda network: network.layers.append(torch.nn.Linear(network.out_dim, network.out_dim)),
            ValueError,
            "^MLP.layers: expected 4 layers, got 5",
        ),
        (replaced(1, Silent(8, 8)), TypeError, r"layers\[1\]: Silent has a forward that isn't"),
        (replaced(1, torch.nn.Dropout()), TypeError, r"layers\[1\]: Dropout has a forward that"),
        (
            lambda network: network.layers[2].register_forward_hook(lambda *_: None),
            TypeError,
            r"layers\[2\]: Linear has hooks",
        ),
    ],
)
def test_altered_layers_are_refused(
    change: Callable[[nn.MLP], None], error: type[Exception], message: str
) -> None:
    """They would be read as if they were plain, or past their end."""
    denoiser, critic = nn.Denoiser(5, 2, 8), nn.TwinCritic(5, 2, 8)
    change(denoiser.trunk)
    change(critic.q1)
    for backend in (None, "reference"):
        with pytest.raises(error, match=message):
            chain(denoiser, backend=backend)
    with pytest.raises(error, match=message):
        score(denoiser)
    with pytest.raises(error, match=message):
        climb(critic)
    with pytest.raises(error, match=message):
        critic(torch.ones(3, 5), torch.zeros(3, 2))
    with pytest.raises(error, match=message):
        critic.loss(torch.ones(3, 5), torch.zeros(3, 2), torch.zeros(3, 1))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_more_or_less_is_refused(layers: int) -> None:
    """By what takes several networks at once, too: it would read beside their parameters."""
    psi, zeta = nn.Psi(4, 2, 6, 8), nn.Zeta(4, 6, 8)
    policy, critics = nn.SquashedGaussian(4, 2, 8), nn.TwinRFFCritic(6, 8)
    state, noise = torch.ones(3, 4), torch.ones(3, 2)
    for network, expected in ((policy.trunk, 3), (psi.trunk, 2), (critics.q2.head, 3)):
        before = network.layers
        widths = [network.in_dim, *[8] * (layers + expected - 3), network.out_dim]
        network.layers = torch.nn.ModuleList(
            torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)
        )
        if len(network.layers) != expected:
            with pytest.raises(ValueError, match=f"^MLP.layers: expected {expected} layers, got"):
                ops.soft_value(policy, psi, critics, state, noise, torch.tensor(0.1))
        network.layers = before
    zeta.trunk.layers.append(torch.nn.Linear(24, 24))
    inputs = torch.ones(3, 6), torch.ones(3, 5), torch.ones(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match="^MLP.layers: expected 2 layers, got 3"):
        ops.representation_loss(psi.trunk, zeta.trunk, *inputs)


@pytest.mark.parametrize("name", ["q1", "q2"])
@pytest.mark.parametrize("kind", ["relu", ["mish", "tanh", "mish"]])
def test_a_critic_of_another_activation_is_called(name: str, kind: str | list[str]) -> None:
    """The kernels are told of one activation for all."""
    critic = nn.TwinCritic(5, 2, 8)
    plain = nn.TwinCritic(5, 2, 8)
    plain.load_state_dict(critic.state_dict())
    other = nn.MLP(7, 8, 1, activation=kind)
    other.load_state_dict(getattr(critic, name).state_dict())
    setattr(critic, name, other)
    state, action, target = torch.randn(3, 5), torch.rand(3, 2), torch.randn(3, 1)

    values = [q(torch.cat([state, action], dim=1)) for q in (critic.q1, critic.q2)]
    assert all(map(torch.equal, critic(state, action), values))
    loss, _ = critic.loss(state, action, target)
    assert torch.allclose(loss, sum(((q - target) ** 2).mean() for q in values))
    assert not torch.equal(loss, plain.loss(state, action, target)[0])
    assert "has activations" in str(diffcore.explain("action_gradient", critic, state, action))
    by_reference = ops.action_gradient(lambda s, a: critic(s, a), state, action)
    assert torch.allclose(ops.action_gradient(critic, state, action), by_reference, atol=1e-6)


def test_critics_of_different_precision_keep_theirs() -> None:
    critic = nn.TwinCritic(5, 2, 32)
    critic.q2.compute_dtype = torch.bfloat16
    state, action = torch.randn(40, 5), torch.rand(40, 2)
    expected = [q(torch.cat([state, action], dim=1)) for q in (critic.q1, critic.q2)]
    assert all(map(torch.equal, critic(state, action), expected))
    _, values = critic.loss(state, action, torch.zeros(40, 1))
    assert torch.equal(values, torch.stack(expected).detach())


@pytest.mark.parametrize("name", ["time_mlp", "trunk"])
def test_a_denoiser_of_another_activation_is_called(name: str) -> None:
    denoiser = nn.Denoiser(5, 2, 8)
    before, loss = chain(denoiser), score(denoiser)
    old = getattr(denoiser, name)
    other = nn.MLP(old.in_dim, 8, old.out_dim, old.hidden_layers, "relu")
    other.load_state_dict(old.state_dict())
    setattr(denoiser, name, other)
    assert not torch.allclose(chain(denoiser), before)
    assert torch.equal(chain(denoiser), chain(denoiser, backend="reference"))
    assert not torch.allclose(score(denoiser), loss)


def test_a_network_that_knows_of_no_backends_is_called() -> None:
    class Own(nn.MLP):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + 1.0

    denoiser, policy, psi = nn.Denoiser(5, 2, 8), nn.SquashedGaussian(5, 2, 8), nn.Psi(5, 2, 6, 8)
    before = chain(denoiser)
    denoiser.trunk = Own(5 + 32 + 2, 8, 2)
    policy.trunk, psi.trunk = Own(5, 8, 4, 2), Own(7, 8, 6, 1)
    assert not torch.allclose(chain(denoiser), before)
    state, noise = torch.ones(3, 5), torch.ones(3, 2)
    action, _ = policy.sample(state, noise)
    loss, _, _ = ops.soft_value(
        policy, psi, nn.TwinRFFCritic(6, 8), state, noise, torch.tensor(0.1)
    )
    assert action.isfinite().all()
    assert loss.isfinite()


def test_a_wrong_width_is_refused() -> None:
    denoiser = nn.Denoiser(5, 2, 8)
    denoiser.action_dim = 3
    with pytest.raises(ValueError, match="^MLP: expected 40 inputs, got layers with 39"):
        chain(denoiser, x_init=None)
    denoiser.action_dim, denoiser.time_mlp = 2, nn.MLP(32, 8, 32, 2)
    with pytest.raises(ValueError, match="^Denoiser.time_mlp: expected 2 layers, got 3"):
        chain(denoiser)


def test_parameters_registered_in_another_order() -> None:
    """As pruning and parametrizations leave them when they are removed."""
    denoiser = nn.Denoiser(5, 2, 8)
    before = chain(denoiser)
    for layer in denoiser.trunk.layers:
        weight = layer.weight
        del layer.weight
        layer.weight = weight
    assert torch.equal(chain(denoiser), before)
