"""What the package says about itself: explain() and show_config()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ISAS, run_script

import diffcore
from diffcore import DiffusionSchedule, nn, ops
from diffcore._kept import constant_under_compile
from diffcore.ops import _native

SCHEDULE = DiffusionSchedule.linear(4)


def arguments() -> dict[str, tuple[Any, ...]]:
    """A call of every op, which the CPU kernels can take where there are any."""
    state, action = torch.randn(2, 5), torch.rand(2, 3)
    mlp = nn.MLP(5, 8, 3, 1)
    weights, biases = [layer.weight for layer in mlp.layers], [layer.bias for layer in mlp.layers]
    zeta = nn.MLP(4, 8, 3 * 2, 1)
    adam = torch.optim.Adam([*mlp.parameters(), *zeta.parameters()])
    representation = mlp, zeta, state, torch.randn(2, 4), torch.randn(2, 2), torch.rand(2)
    return {
        "action_gradient": (nn.TwinCritic(5, 3, 8), state, action),
        "critic_loss": (
            state,
            [mlp.weights_and_biases()] * 2,
            ["mish", "identity"],
            torch.randn(2, 3),
        ),
        "denoising_loss": (nn.Denoiser(5, 3, 8), SCHEDULE, state, action),
        "mlp": (state, weights, biases, ["mish", "identity"]),
        "mlp_ensemble": (state, [mlp.weights_and_biases()] * 2, ["mish", "identity"]),
        "q_sample": (action, torch.tensor([0, 3]), action, SCHEDULE),
        "representation_loss": representation,
        "representation_step": (*representation, adam),
        "reverse_diffusion": (nn.Denoiser(5, 3, 8), SCHEDULE, state),
        "reverse_step": (action, action, SCHEDULE.solver().coefficients[0]),
        "rff_features": (state, torch.randn(8, 5)),
        "score_matching_loss": (
            torch.randn(2, 4),
            state,
            torch.randn(4 * 3, 5),
            torch.randn(4 * 3),
            action,
            torch.rand(2),
        ),
        "soft_value": (
            nn.SquashedGaussian(5, 3, 8),
            nn.Psi(5, 3, 6, 8).requires_grad_(False),
            nn.TwinRFFCritic(6, 8).requires_grad_(False),
            state,
            action,
            torch.tensor(0.1),
        ),
        "squashed_gaussian": (
            state,
            [weights[0], torch.randn(6, 8)],
            [biases[0], torch.randn(6)],
            ["mish", "identity"],
            action,
        ),
    }


def test_every_op_is_explained() -> None:
    assert set(arguments()) == set(ops.__all__)


@pytest.mark.parametrize("op", ops.__all__)
def test_explain_names_the_fastest_backend(op: str) -> None:
    answer = diffcore.explain(op, *arguments()[op])
    assert answer.op == op
    assert answer.backend == ("reference" if op == "q_sample" else "cpu")
    assert answer.passed_over == {}
    assert str(answer) == f"{op}: runs on '{answer.backend}'"


@pytest.mark.parametrize("op", ["action_gradient", "reverse_diffusion"])
def test_explain_says_why_not(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "NATIVE_ACTIVATIONS", ("identity", "gelu"))
    network, *rest = arguments()[op]
    answer = diffcore.explain(op, network, *rest)
    assert answer.backend == "reference"
    assert str(answer).splitlines() == [
        f"{op}: runs on 'reference'",
        "  not on 'cpu': activation 'mish' has no CPU kernel",
    ]


@pytest.mark.parametrize("op", ops.__all__)
def test_explain_takes_what_the_op_takes(op: str) -> None:
    answer = diffcore.explain(op, *arguments()[op], backend="reference")
    assert answer.backend == "reference"
    with pytest.raises(ValueError, match="^backend: expected one of"):
        diffcore.explain(op, *arguments()[op], backend="gpu")


@pytest.mark.parametrize("op", ops.__all__)
def test_explain_draws_nothing(op: str) -> None:
    values = arguments()[op]
    before = torch.get_rng_state()
    diffcore.explain(op, *values)
    assert torch.equal(torch.get_rng_state(), before)


def test_explain_steps_nothing() -> None:
    psi, *rest, adam = arguments()["representation_step"]
    before = [parameter.clone() for parameter in psi.parameters()]
    diffcore.explain("representation_step", psi, *rest, adam)
    assert not adam.state
    assert all(map(torch.equal, psi.parameters(), before))


def test_explain_knows_the_op_s_own_signature() -> None:
    with pytest.raises(TypeError, match=r"q_sample\(\) missing 1 required .* 'schedule'"):
        diffcore.explain("q_sample", *arguments()["q_sample"][:3])
    with pytest.raises(TypeError, match=r"q_sample\(\) got an unexpected .* 'clip'"):
        diffcore.explain("q_sample", *arguments()["q_sample"], clip=1.0)


@pytest.mark.parametrize("op", ["critic_loss", "mlp", "mlp_ensemble", "rff_features"])
def test_explain_takes_what_autocast_s_layers_hand_on(op: str) -> None:
    x, *rest = arguments()[op]
    with torch.autocast("cpu", torch.bfloat16):
        assert diffcore.explain(op, x.bfloat16(), *rest).backend == "cpu"


def test_bad_input_of_explain() -> None:
    with pytest.raises(ValueError, match="^op: expected one of .*, got 'softmax'"):
        diffcore.explain("softmax")
    denoiser, schedule, state = arguments()["reverse_diffusion"]
    with pytest.raises(ValueError, match="^state: "):
        diffcore.explain("reverse_diffusion", denoiser, schedule, state[:, :4])


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs on the reference, and explain says what is missing."""
    monkeypatch.setattr(_native, "_core", None)
    monkeypatch.setattr(_native, "unavailable", "the compiled module can't be imported (why)")
    for op, values in arguments().items():
        answer = diffcore.explain(op, *values)
        assert answer.backend == "reference"
        assert "why" in answer.passed_over.get("cpu", "why")
        getattr(ops, op)(*values)
    assert "can't be imported (why)" in diffcore.show_config()


# -- show_config -----------------------------------------------------------------------------------


def test_show_config() -> None:
    shown = diffcore.show_config()
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert lines["diffcore"] == diffcore.__version__
    assert lines["torch"] == torch.__version__
    assert lines["threads"].startswith(f"{torch.get_num_threads()} ")
    for isa in ISAS:
        assert isa in shown


def test_show_config_names_the_instruction_set_in_use(isa: str) -> None:
    assert f"{isa} of {', '.join(ISAS)}" in diffcore.show_config()


def test_show_config_with_a_bad_instruction_set() -> None:
    result = run_script("import diffcore; diffcore.show_config()", DIFFCORE_ISA="sse9")
    assert result.returncode == 1
    assert "DIFFCORE_ISA: unknown instruction set 'sse9'" in result.stderr


@pytest.mark.parametrize("module", [diffcore, ops, nn])
def test_public_names_exist(module: Any) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_import_leaves_the_compiler_alone() -> None:
    """Importing it takes torch a second, which a run that compiles nothing can do without."""
    done = run_script("import sys, diffcore.ops; print('torch._dynamo' in sys.modules)")
    assert done.stdout.strip() == "False"


def test_constants_are_marked_as_torch_marks_them() -> None:
    def ours() -> None: ...

    def torchs() -> None: ...

    assert constant_under_compile(ours) is ours
    torch.compiler.assume_constant_result(torchs)
    assert vars(ours) == vars(torchs)
