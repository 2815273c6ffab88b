"""The compiled module's quick looks at tensors and layers agree with what torch says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from diffcore import DiffusionSchedule, explain, ops
from diffcore.nn import MLP, Denoiser, TwinCritic
from diffcore.ops import _native
from diffcore.ops._compile import GLOBAL_HOOKS

core = _native._core
pytestmark = pytest.mark.skipif(core is None, reason="needs the compiled module")

EXCHANGE_API = getattr(Tensor, "__dlpack_c_exchange_api__", None)


def use(exchange_api: Any) -> None:
    core.use_torch(Tensor, nn.Parameter, nn.Linear, torch.float32, GLOBAL_HOOKS, exchange_api)


@pytest.fixture(params=["dlpack", "python"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways of looking: torch from 2.10 on has the first, older ones the second alone."""
    if request.param == "dlpack" and EXCHANGE_API is None:
        pytest.skip("this torch has no DLPack exchange functions")
    use(EXCHANGE_API if request.param == "dlpack" else None)
    yield request.param
    use(EXCHANGE_API)


GLOBAL_REGISTRATIONS = [
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
]


class Subclass(Tensor):
    pass


def leaked() -> Tensor:
    """A wrapper that outlived its transform."""
    seen: list[Tensor] = []
    torch.func.grad(lambda x: (seen.append(x), x.sum())[1])(torch.ones(3, 2))
    return seen[0]


def freed() -> Tensor:
    """As torch's FSDP keeps the parameters of which another process has the values."""
    tensor = torch.ones(3, 2)
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_part() -> Tensor:
    """One that began somewhere within its storage."""
    whole = torch.ones(13)
    part = whole[5:11].view(3, 2)
    whole.untyped_storage().resize_(0)
    return part


TENSORS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(3, 2),
    "parameter": lambda: nn.Parameter(torch.randn(3, 2)),
    "transposed": lambda: torch.randn(2, 3).t(),
    "expanded": lambda: torch.randn(1, 2).expand(3, 2),
    "sliced": lambda: torch.randn(6, 2)[::2],
    "inference": lambda: torch.inference_mode()(lambda: torch.randn(3, 2))(),
    "empty": lambda: torch.randn(0, 2),
    "vector": lambda: torch.randn(3),
    "scalar": lambda: torch.randn(()),
    "cube": lambda: torch.randn(3, 2, 2),
    "double": lambda: torch.randn(3, 2, dtype=torch.float64),
    "half": lambda: torch.randn(3, 2).half(),
    "bfloat16": lambda: torch.randn(3, 2).bfloat16(),
    "float8": lambda: torch.randn(3, 2).to(torch.float8_e5m2),
    "integer": lambda: torch.ones(3, 2, dtype=torch.int64),
    "bool": lambda: torch.ones(3, 2, dtype=torch.bool),
    "complex": lambda: torch.ones(3, 2, dtype=torch.complex64),
    "meta": lambda: torch.ones(3, 2, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "negated": lambda: torch._neg_view(torch.ones(3, 2)),
    "zeros without memory": lambda: torch._efficientzerotensor(3, 2),
    "subclass": lambda: torch.ones(3, 2).as_subclass(Subclass),
    "leaked": leaked,
    "freed": freed,
    "freed part": freed_part,
}
#: Of which a quick look can say that their memory holds their values.
PLAIN = set(TENSORS) - {
    "meta",
    "sparse",
    "negated",
    "zeros without memory",
    "subclass",
    "leaked",
    "freed",
    "freed part",
}


@pytest.mark.parametrize("name", TENSORS)
def test_plain_tensors(way: str, name: str) -> None:
    tensor = TENSORS[name]()
    assert core.are_plain((tensor,)) == (name in PLAIN)
    assert core.are_plain(("mish", None, [tensor, 1.0], True)) == (name in PLAIN)


@pytest.mark.parametrize("other", [object(), (1, 2), torch.float32, {"a": 1}])
def test_other_arguments_aren_t_plain(way: str, other: object) -> None:
    assert not core.are_plain((other,))
    assert not core.are_plain(([other],))


@pytest.mark.parametrize("name", TENSORS)
def test_float32_on_the_cpu(way: str, name: str) -> None:
    tensor = TENSORS[name]()
    yes = tensor.dtype is torch.float32 and tensor.is_cpu
    has_memory = name in PLAIN or name == "negated"
    assert core.are_float32_on_cpu([torch.ones(1), tensor], False) == (yes and has_memory)
    assert not core.are_float32_on_cpu((tensor,), False)  # not a list
    if core.are_float32_on_cpu([tensor], False):
        assert core.are_float32_on_cpu([tensor], True) == tensor.is_contiguous()


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("shape", [(3, 2), ("B", 2), (3, "in"), ("...", 2), (3,), (), (2, 3)])
def test_shapes(way: str, name: str, shape: tuple[int | str, ...]) -> None:
    tensor = TENSORS[name]()
    fits = (
        tensor.is_floating_point()
        and tensor.ndim == len(shape)
        and all(isinstance(w, str) or h == w for h, w in zip(tensor.shape, shape, strict=True))
    )
    said = core.fits(tensor, shape)
    assert said == fits if name in PLAIN and name != "float8" else fits or not said


@pytest.mark.parametrize("value", [None, 1.0, [[1.0, 2.0]], "text", object()])
def test_what_isn_t_a_tensor(way: str, value: object) -> None:
    assert not core.fits(value, ("B", "in"))
    assert not core.are_float32_on_cpu([value], False)
    assert not core.layers_fit([value], [value], 1)
    assert not core.same_sizes([value], [value])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_layers_fit(widths: list[int], data: st.DataObject) -> None:
    out = [data.draw(st.integers(1, 4)) for _ in widths]
    bias = [data.draw(st.sampled_from([n, n, n + 1])) for n in out]
    weights = [torch.empty(n, w) for n, w in zip(out, widths, strict=True)]
    biases = [torch.empty(n) for n in bias]
    fit = out == bias and out[:-1] == widths[1:]
    assert core.layers_fit(weights, biases, widths[0]) == fit
    assert not core.layers_fit(weights, biases, widths[0] + 1)
    assert not core.layers_fit(weights, biases[1:], widths[0])


def test_same_sizes(way: str) -> None:
    tensors = [torch.empty(3, 2), torch.empty(3)]
    assert core.same_sizes(tensors, [nn.Parameter(torch.empty(3, 2)), torch.empty(3)])
    for others in (
        [torch.empty(2, 3), torch.empty(3)],
        [torch.empty(3, 2), torch.empty(3, 1)],
        [torch.empty(3, 2), torch.empty(3, dtype=torch.float64)],
        [torch.empty(3, 2)],
        tuple(tensors),
    ):
        assert not core.same_sizes(tensors, others)
    cube = [torch.empty(3, 2, 2)]
    assert not core.same_sizes(cube, cube)


def test_sharing(way: str) -> None:
    memory = torch.zeros(40)
    first, second = nn.Parameter(memory[:6].view(3, 2)), memory[6:9]
    apart = [torch.ones(3), memory[9:12], memory[5:5], memory[12:].view(4, 7)[:, 1:3]]
    assert core.sharing(apart, [second, first]) is None
    for shared in (
        memory[5:7],
        memory[5:6],
        memory[:12].view(2, 6).t(),
        memory[4].expand(50),
        memory[4::3],
        memory[:6].view(torch.int64),
        memory.view(torch.uint8)[23:24],
        memory.view(torch.uint8)[35:60],
    ):
        assert core.sharing([*apart, shared], [second, first]) == len(apart)
    for untouched in (memory.view(torch.uint8)[36:60], memory[9::3], memory[9].expand(50)):
        assert core.sharing([untouched], [second, first]) is None
    assert core.sharing(apart, [memory[3:4], second, first]) == len(apart)
    assert core.sharing([], [torch.ones(3), first, first]) == 0
    assert core.sharing([memory], []) is None


# -- layers ------------------------------------------------------------------------------------------


def changed(change: Callable[[MLP], object]) -> MLP:
    mlp = MLP(2, 5, 3, 2)
    change(mlp)
    return mlp


def replace_layer(layer: nn.Module) -> Callable[[MLP], object]:
    return lambda mlp: mlp.layers.__setitem__(1, layer)


def test_layers_in_order(way: str) -> None:
    mlp = MLP(2, 5, 3, 2)
    for dims in ((2, 3), (None, 3), (2, None), (None, None)):
        for found in (
            core.linear_stack(mlp.layers._modules, 3, *dims),
            core.mlp_stack(mlp, MLP, *dims),
        ):
            assert len(found) == 6
            assert all(p is q for p, q in zip(found, mlp.parameters(), strict=True))
    assert core.linear_stack(mlp.layers._modules, 2, 2, 3) is None
    for dims in ((3, 3), (2, 2)):
        assert core.mlp_stack(mlp, MLP, *dims) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: mlp.layers[0].register_forward_hook(lambda *_: None),
        lambda mlp: mlp.layers[2].register_forward_pre_hook(lambda *_: None),
        lambda mlp: mlp.layers[1].register_full_backward_hook(lambda *_: None),
        lambda mlp: mlp.layers[1].register_full_backward_pre_hook(lambda *_: None),
        lambda mlp: setattr(mlp.layers[1], "forward", lambda x: x),
        lambda mlp: nn.utils.parametrizations.weight_norm(mlp.layers[0]),
        lambda mlp: setattr(mlp.layers[0], "weight", None),
        lambda mlp: mlp.layers.pop(1),
        replace_layer(nn.Linear(5, 5, bias=False)),
        replace_layer(nn.Linear(5, 4)),
        replace_layer(nn.Identity()),
        replace_layer(type("Doubled", (nn.Linear,), {})(5, 5)),
    ],
)
def test_odd_layers_take_a_closer_look(way: str, change: Callable[[MLP], object]) -> None:
    mlp = changed(change)
    assert core.linear_stack(mlp.layers._modules, 3, 2, 3) is None
    assert core.mlp_stack(mlp, MLP, 2, 3) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: mlp.register_forward_hook(lambda *_: None),
        lambda mlp: setattr(mlp, "forward", lambda x: x),
    ],
)
def test_an_odd_mlp_takes_a_closer_look(way: str, change: Callable[[MLP], object]) -> None:
    assert core.mlp_stack(changed(change), MLP, 2, 3) is None
    assert core.mlp_stack(type("Derived", (MLP,), {})(2, 5, 3, 2), MLP, 2, 3) is None


def test_several_mlps_of_a_module(way: str) -> None:
    critic, networks = TwinCritic(3, 2, 5), (("q1", 5, 1), ("q2", 5, 1))

    def look(module: TwinCritic, kind: type = TwinCritic, activation: object = "mish") -> Any:
        return core.mlp_stacks(module, kind, networks, MLP, activation, False)

    first, second = look(critic)
    for found, expected in ((first, critic.q1), (second, critic.q2)):
        assert all(p is q for p, q in zip(found, expected.parameters(), strict=True))
    others = (("q1", 5, 1), ("q2", 4, 1))
    assert core.mlp_stacks(critic, TwinCritic, others, MLP, "mish", False) is None
    assert look(critic, MLP) is None
    assert look(critic, activation="relu") is None
    assert look(critic, activation=["mish"] * 3) is None
    assert look(critic, activation="".join(["mi", "sh"])) is not None  # another object
    critic.q2.activations[-1] = "mish"
    assert look(critic) is None
    critic.q2.activations[-1] = "identity"
    critic.q2.layers[0].register_forward_hook(lambda *_: None)
    assert look(critic) is None
    hooked = TwinCritic(3, 2, 5)
    hooked.register_forward_hook(lambda *_: None)
    assert look(hooked) is None
    assert hooked.unaltered_networks() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.double(),
        lambda p: p.bfloat16(),
        lambda p: p.to("meta"),
        torch._neg_view,
        lambda p: p.as_subclass(Subclass),
    ],
)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_plain_parameters(way: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
    critic, denoiser = TwinCritic(3, 2, 5), Denoiser(3, 2, 5)
    networks, parameters = critic.plain_networks(), denoiser.plain_weights_and_biases()
    assert networks is not None
    assert parameters is not None
    both = [*networks[0], *networks[1]]
    assert all(p is q for p, q in zip(both, critic.parameters(), strict=True))
    assert all(p is q for p, q in zip(parameters, denoiser.parameters(), strict=True))
    for layers in (critic.q2.layers, denoiser.trunk.layers, denoiser.time_mlp.layers):
        layer = layers[1]
        kept = getattr(layer, name)
        setattr(layer, name, nn.Parameter(change(kept.detach())))
        which = critic.plain_networks if layers is critic.q2.layers else None
        assert (which or denoiser.plain_weights_and_biases)() is None
        setattr(layer, name, kept)
    assert critic.plain_networks() is not None
    assert denoiser.plain_weights_and_biases() is not None


def test_inputs_of_a_network(way: str) -> None:
    state, action, mlp = torch.randn(4, 5), torch.randn(4, 3), MLP(8, 5, 2)
    look = core.inputs_fit
    assert look([state, action], (5, 3), mlp)
    assert look([state[None]], (5,), mlp)  # alone, of any leading dimensions
    assert look([state[0]], (5,), mlp)
    assert look([state.t().contiguous().t(), action[:, ::1]], (5, 3), mlp)
    for tensors, widths in (
        ([state, action], (5, 4)),
        ([state[:1], action], (5, 3)),
        ([state[None], action[None]], (5, 3)),
        ([state.double(), action], (5, 3)),
        ([state.long(), action], (5, 3)),
        ([state.to("meta"), action], (5, 3)),
        ([state.numpy(), action], (5, 3)),
        ([state, None], (5, 3)),
        ([state[0, 0]], (1,)),
    ):
        assert not look(tensors, widths, mlp)
    assert not look([state], (5,), MLP(8, 5, 2).double())
    assert look([state.double()], (5,), MLP(8, 5, 2).double()) is (way == "dlpack")
    for other in (None, object(), nn.Linear(5, 2), nn.Sequential(nn.Linear(5, 2))):
        assert not look([state], (5,), other)
    mlp.layers[0] = nn.Dropout()
    assert not look([state], (5,), mlp)


@pytest.mark.parametrize("register", GLOBAL_REGISTRATIONS)
def test_global_hooks_take_a_closer_look(way: str, register: Callable[[Any], Any]) -> None:
    """At what a call would meet them: of networks run by their weights alone there is none."""
    critic, networks = TwinCritic(3, 2, 5), (("q1", 5, 1), ("q2", 5, 1))
    assert core.mlp_stacks(critic, TwinCritic, networks, MLP, "mish", False) is not None
    handle = register(lambda *_: None)
    try:
        assert core.mlp_stacks(critic, TwinCritic, networks, MLP, "mish", False) is None
        assert core.mlp_stack(critic.q1, MLP, 5, 1) is not None
    finally:
        handle.remove()
    assert core.mlp_stacks(critic, TwinCritic, networks, MLP, "mish", False) is not None


def test_kernels_read_weights_that_don_t_lie_row_by_row(way: str) -> None:
    denoiser, critic, schedule = Denoiser(3, 2), TwinCritic(3, 2), DiffusionSchedule.cosine(5)
    state, action = torch.randn(4, 3), torch.rand(4, 2)

    def results() -> list[Tensor]:
        chain = ops.reverse_diffusion(
            denoiser, schedule, state, x_init=action, noise_scale=0.0, backend="cpu"
        )
        q1, _ = critic(state, action, backend="cpu")
        return [chain, ops.action_gradient(critic, state, action, backend="cpu"), q1]

    expected = results()
    for parameter in [*denoiser.parameters(), *critic.parameters()]:
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()
        else:
            parameter.data = torch.stack([parameter.data, parameter.data], dim=1)[:, 0]
    assert not denoiser.trunk.layers[1].weight.is_contiguous()
    assert all(map(torch.equal, results(), expected))


def test_weights_whose_memory_was_freed_are_refused(way: str) -> None:
    critic, state, action = TwinCritic(3, 2), torch.randn(4, 3), torch.rand(4, 2)
    critic.q1.layers[1].weight.untyped_storage().resize_(0)
    x, biases, activations = torch.randn(4, 2), [torch.zeros(3)], ["identity"]
    for call in (
        lambda: ops.action_gradient(critic, state, action),
        lambda: critic(state, action),
        lambda: ops.mlp(x, [freed()], biases, activations),
        lambda: ops.mlp(x, [freed_part()], biases, activations),
        lambda: core.norm([freed()]),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            call()


def test_inputs_whose_memory_was_freed_are_no_kernel_s(way: str) -> None:
    critic, state, action = TwinCritic(3, 2), torch.randn(4, 3), torch.rand(4, 2)
    state.untyped_storage().resize_(0)
    why = explain("action_gradient", critic, state, action).passed_over["cpu"]
    assert why == "a tensor's memory was freed"


def test_answers_of_another_type_take_a_closer_look() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return object()

    use(None)
    try:
        x = torch.ones(3, 2)
        with Mode():
            assert not core.fits(x, (3, 2))
            assert not core.are_float32_on_cpu([x], False)
    finally:
        use(EXCHANGE_API)


def test_an_unknown_exchange_is_left_alone() -> None:
    for other in (1, object(), None):
        use(other)
        try:
            assert core.fits(torch.ones(3, 2), (3, 2))
        finally:
            use(EXCHANGE_API)
