"""A GPU that isn't there: ops run on fake tensors of it, up to the launches of their kernels.

Launches are recorded instead of made. Autograd's engine takes a real device, so a Function's backward
is called right after its forward, as by a plain ``loss.backward()``.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Hashable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _backends, _native

Module = TypeVar("Module", bound=torch.nn.Module)

SCHEDULE = DiffusionSchedule.linear(2)

WITHOUT_CUDA_KERNELS = (
    "critic_loss",
    "denoising_loss",
    "mlp",
    "mlp_ensemble",
    "q_sample",
    "representation_loss",
    "score_matching_loss",
    "soft_value",
    "squashed_gaussian",
)
WITH_CUDA_KERNELS = ("action_gradient", "reverse_diffusion", "reverse_step", "rff_features")

#: (op, backend). Without representation_step, on a GPU the loss, ``backward()`` and torch's Adam.
CASES = [
    *((op, "triton") for op in (*WITHOUT_CUDA_KERNELS, *WITH_CUDA_KERNELS)),
    *((op, "cuda") for op in WITH_CUDA_KERNELS),
]


class Launch(NamedTuple):
    """Of a kernel; `compiled_for` tells apart what Triton compiles it for, each once."""

    kernel: str
    tensors: list[Tensor]
    compiled_for: Hashable = None


# -- the device ------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_gpu() -> Iterator[list[Launch]]:
    """Fake CUDA tensors can be made, and calls on them end in the list."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        _interpret_triton(patch)
        _accept_fake_tensors(patch)
        _record_cuda_kernels(patch, launches)
        _record_triton_kernels(patch, launches)
        _replace_autograd(patch)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            _give_tables(patch)
            yield launches


def triton_module() -> Any:
    """``diffcore.ops._triton``, for whoever is first to import it in a process of tests."""
    with pytest.MonkeyPatch.context() as patch:
        _interpret_triton(patch)
        return importlib.import_module("diffcore.ops._triton")


def _interpret_triton(patch: pytest.MonkeyPatch) -> None:
    """As conftest.py has it: kernels imported meanwhile are the interpreter's, for all tests."""
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")


def _accept_fake_tensors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_backends, "_has_triton", lambda: True)
    patch.setattr(_backends, "_runs_on_cpu", lambda name: False)
    patch.setattr(_backends, "_device_lacks", lambda device: None)
    patch.setattr(_backends, "_driver_lacks", lambda index: None)
    # A call goes to its kernel as without modes.
    patch.setattr(_native, "_dispatching", lambda args: False)
    patch.setattr(Tensor, "__getitem__", _element)
    patch.setattr(Tensor, "__setitem__", _set_element)
    patch.setattr(Tensor, "__int__", lambda tensor: int(tensor.item()))
    patch.setattr(Tensor, "__float__", lambda tensor: float(tensor.item()))
    for name in ("device", "device_of"):
        patch.setattr(torch.cuda, name, CurrentDevice)
    patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))


class CurrentDevice:
    """``torch.cuda.device`` and ``torch.cuda.device_of``, of a device or of a tensor on it."""

    entered = 0

    def __init__(self, device: int | Tensor) -> None: ...

    def __enter__(self) -> None:
        CurrentDevice.entered += 1

    def __exit__(self, *exception: object) -> None:
        CurrentDevice.entered -= 1


def _element(tensor: Tensor, index: Any) -> Tensor:
    """``tensor[index]``, for which torch looks for the device, of numbers, slices and None."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dim)
        else:
            assert isinstance(part, slice), "an index on the device isn't taken here"
            bounds = part.start, part.stop, part.step or 1
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, *bounds)
        dim += 1
    return tensor


def _set_element(tensor: Tensor, index: Any, value: Tensor) -> None:
    """Without an effect: fake tensors have no values, and torch's ``copy_`` looks for the device."""
    torch.ops.aten.copy(_element(tensor, index), value)


def _record_cuda_kernels(patch: pytest.MonkeyPatch, launches: list[Launch]) -> None:
    class Module:
        on_cpu = False

        def __getattr__(self, name: str) -> Any:
            if name[0].isupper():  # an enumeration
                return getattr(_native._core, name)

            def call(*args: Any) -> int | None:
                assert CurrentDevice.entered, f"{name} on whatever device is current"
                if name.endswith(("_workspace", "_plan")):
                    return 64 if name.endswith("_workspace") else None
                launches.append(Launch(name, []))
                return None

            return call

    patch.setattr(_native, "_cuda", Module())
    patch.setattr(_native, "cuda_unavailable", None)
    patch.setattr(Tensor, "data_ptr", lambda tensor: 4096)


def _record_triton_kernels(patch: pytest.MonkeyPatch, launches: list[Launch]) -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    _triton = triton_module()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
        launches.append(Launch(kernel.fn.__name__, tensors, _compiled_for(kernel, args, settings)))

    for kind in (InterpretedFunction, JITFunction):
        patch.setattr(kind, "run", run)
    patch.setattr(_triton, "on_nvidia", lambda: True)
    patch.setattr(_triton, "processors", lambda device: 132)  # an H100's


def _compiled_for(kernel: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> Hashable:
    """What of a launch Triton compiles a kernel of its own for, as said by ``specialize_impl``.

    Whether an address is a multiple of 16, the same for all tensors here, is left out.
    """
    exempt = kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel)
    names = list(kernel.fn.__annotations__.keys() | set(kernel.arg_names))
    constants = {n for n in names if "constexpr" in str(kernel.fn.__annotations__.get(n))}
    unspecialized = set(exempt["do_not_specialize"] or ())

    def look(name: str, value: Any) -> Hashable:
        if name in constants or value is None or isinstance(value, bool):
            return value
        if isinstance(value, tuple):
            return tuple(look(name, element) for element in value)
        if isinstance(value, Tensor):
            return str(value.dtype)
        if isinstance(value, int) and name not in unspecialized:
            return value == 1, value % 16 == 0
        return type(value).__name__

    bound = dict(zip(kernel.arg_names, args, strict=False)) | settings
    return tuple((name, look(name, value)) for name, value in sorted(bound.items()))


def _replace_autograd(patch: pytest.MonkeyPatch) -> None:
    class Context(SimpleNamespace):
        def save_for_backward(self, *tensors: Tensor | None) -> None:
            self.saved_tensors = tensors

        def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

        def set_materialize_grads(self, value: bool) -> None: ...

    def apply(function: Any, *args: Any) -> Any:
        output = function.forward(*args)
        wanted = [isinstance(a, Tensor) and a.requires_grad for a in args]
        context = Context(needs_input_grad=wanted)
        function.setup_context(context, args, output)
        grads = map(torch.empty_like, output if isinstance(output, tuple) else (output,))
        function.backward(context, *grads)
        return output

    patch.setattr(_native, "apply", apply)
    patch.setattr(_native, "differentiates", lambda *tensors: any(map(_requires_grad, tensors)))
    keep_graph = "_get_current_graph_task_keep_graph"
    patch.setattr(torch._C._autograd, keep_graph, lambda: False)


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _give_tables(patch: pytest.MonkeyPatch) -> None:
    """What is copied to the device once for a schedule and kept, before any capture."""

    def give(op: str, name: str, *columns: int) -> None:
        made = tuple(torch.empty(SCHEDULE.K, n, device="cuda") for n in columns)
        patch.setattr(importlib.import_module(f"diffcore.ops.{op}"), name, lambda *args: made)

    give("reverse_diffusion", "_tables", 7, 32)
    give("q_sample", "_levels", 2)
    give("denoising_loss", "_tables", 2, 32)


# -- calls -----------------------------------------------------------------------------------------


def call(op: str, backend: str, batch: int = 6, dtype: torch.dtype | None = None) -> None:
    """Every way through an op, forward and back, on fake tensors; in `dtype` where it takes one."""
    run = {
        "action_gradient": _action_gradient,
        "critic_loss": _critic_loss,
        "denoising_loss": _denoising_loss,
        "mlp": _mlp,
        "mlp_ensemble": _mlp_ensemble,
        "q_sample": _q_sample,
        "representation_loss": _representation_loss,
        "reverse_diffusion": _reverse_diffusion,
        "reverse_step": _reverse_step,
        "rff_features": _rff_features,
        "score_matching_loss": _score_matching_loss,
        "soft_value": _soft_value,
        "squashed_gaussian": _squashed_gaussian,
    }[op]
    with torch.device("cuda"):
        run(batch, {"backend": backend, "compute_dtype": dtype})


def _leaf(*shape: int) -> Tensor:
    return torch.empty(shape, requires_grad=True)


def _module(kind: type[Module], *sizes: int) -> Module:
    """One of the library's, whose initial values can't be drawn on the device."""
    with torch.device("meta"):
        module = kind(*sizes)
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            setattr(child, name, torch.nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in list(child.named_buffers(recurse=False)):
            setattr(child, name, torch.empty(buffer.shape))
    return module


def _network(inputs: int, outputs: int) -> nn.MLP:
    return _module(nn.MLP, inputs, 256, outputs, 2)


def _layers(network: nn.MLP) -> tuple[list[Tensor], list[Tensor], list[str]]:
    parameters = network.weights_and_biases()
    return parameters[::2], parameters[1::2], list(network.activations)


def _action_gradient(batch: int, options: dict[str, Any]) -> None:
    critic, state, action = (
        _module(nn.TwinCritic, 17, 6),
        torch.empty(batch, 17),
        torch.empty(batch, 6),
    )
    ops.action_gradient(critic, state, action, **options)
    ops.action_gradient(critic, state, action, max_norm=0.1, **options)


def _critic_loss(batch: int, options: dict[str, Any]) -> None:
    critics = [_network(23, 1) for _ in range(2)]
    networks, names = [c.weights_and_biases() for c in critics], list(critics[0].activations)
    arguments = _leaf(batch, 23), networks, names, torch.empty(batch, 1)
    ops.critic_loss(*arguments, **options)
    ops.critic_loss(*arguments, weight=torch.empty(batch), **options)


def _denoising_loss(batch: int, options: dict[str, Any]) -> None:
    denoiser, state, action = _module(nn.Denoiser, 17, 6), _leaf(batch, 17), _leaf(batch, 6)
    ops.denoising_loss(denoiser, SCHEDULE, state, action, **options)
    given = {
        "t": torch.empty(batch, dtype=torch.int32),
        "noise": torch.empty(batch, 6),
        "weight": torch.empty(batch),
    }
    ops.denoising_loss(denoiser, SCHEDULE, state, action, **given, **options)
    ops.denoising_loss(denoiser, SCHEDULE, state, action, reduction="none", **given, **options)
    ops.denoising_loss(
        denoiser.requires_grad_(False), SCHEDULE, *map(torch.empty_like, (state, action)), **options
    )


def _mlp(batch: int, options: dict[str, Any]) -> None:
    ops.mlp(_leaf(batch, 23), *_layers(_network(23, 6)), **options)
    ops.mlp(torch.empty(batch, 23), *_layers(_network(23, 6).requires_grad_(False)), **options)


def _mlp_ensemble(batch: int, options: dict[str, Any]) -> None:
    networks = [_network(23, 1) for _ in range(2)]
    parameters = [n.weights_and_biases() for n in networks]
    ops.mlp_ensemble(_leaf(batch, 23), parameters, list(networks[0].activations), **options)


def _q_sample(batch: int, options: dict[str, Any]) -> None:
    del options["compute_dtype"]
    t = torch.empty(batch, dtype=torch.int64)
    ops.q_sample(_leaf(batch, 6), t, _leaf(batch, 6), SCHEDULE, **options)


def _representation_loss(batch: int, options: dict[str, Any]) -> None:
    psi, zeta = _network(23, 256), _network(17, 256 * 17)
    inputs = _leaf(batch, 23), _leaf(batch, 17), torch.empty(batch, 17), torch.empty(batch)
    ops.representation_loss(psi, zeta, *inputs, **options)


def _reverse_diffusion(batch: int, options: dict[str, Any]) -> None:
    denoiser, state = _module(nn.Denoiser, 17, 6), _leaf(batch, 17)
    ops.reverse_diffusion(denoiser, SCHEDULE, state, **options)
    given = {"x_init": _leaf(batch, 6), "noise": _leaf(SCHEDULE.K, batch, 6)}
    ops.reverse_diffusion(denoiser, SCHEDULE, state, **given, **options)
    frozen, state = denoiser.requires_grad_(False), torch.empty(batch, 17)
    ops.reverse_diffusion(frozen, SCHEDULE, state, **options)


def _reverse_step(batch: int, options: dict[str, Any]) -> None:
    del options["compute_dtype"]
    x, eps, noise, x0 = (_leaf(batch, 6) for _ in range(4))
    ops.reverse_step(x, eps, torch.empty(7), noise=noise, x0_previous=x0, **options)


def _rff_features(batch: int, options: dict[str, Any]) -> None:
    del options["compute_dtype"]
    for kind in ("sin", "cos_sin"):
        ops.rff_features(_leaf(batch, 256), _leaf(512, 256), _leaf(512), kind=kind, **options)


def _score_matching_loss(batch: int, options: dict[str, Any]) -> None:
    last = _leaf(256 * 17, 512), _leaf(256 * 17)
    others = torch.empty(batch, 17), torch.empty(batch)
    ops.score_matching_loss(_leaf(batch, 256), _leaf(batch, 512), *last, *others, **options)


def _soft_value(batch: int, options: dict[str, Any]) -> None:
    del options["compute_dtype"], options["backend"]  # it chooses a backend for each part
    policy, psi = _module(nn.SquashedGaussian, 17, 6), _module(nn.Psi, 17, 6, 256)
    inputs = torch.empty(batch, 17), torch.empty(batch, 6), torch.empty(())
    ops.soft_value(policy, psi, _module(nn.TwinRFFCritic, 256), *inputs)


def _squashed_gaussian(batch: int, options: dict[str, Any]) -> None:
    noise = torch.empty(batch, 6)
    ops.squashed_gaussian(_leaf(batch, 17), *_layers(_network(17, 12)), noise, **options)
