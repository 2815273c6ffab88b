"""The compiled module, and what its callers share."""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, List, NamedTuple, get_args, get_origin, get_type_hints  # noqa: UP035

# torch first: it brings its own OpenMP runtime, and an extension loaded after it shares that copy
# and its threads instead of starting a second pool.
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from diffcore.ops import _flops
from diffcore.ops._compile import GLOBAL_HOOKS
from diffcore.ops._rules import by_name

_core: Any
unavailable: str | None = None
try:
    _core = importlib.import_module("diffcore._core")
except ImportError as error:  # a source tree without a build; the reference runs everything
    _core = None
    unavailable = f"the compiled module can't be imported ({error})"

_cuda: Any
cuda_unavailable: str | None = None
try:
    _cuda = importlib.import_module("diffcore._cuda")
except ModuleNotFoundError:
    _cuda = None
    cuda_unavailable = "the CUDA kernels weren't built (no nvcc when diffcore was installed)"
except ImportError as error:
    _cuda = None
    cuda_unavailable = f"the CUDA kernels can't be imported ({error})"

if _core is not None:
    _core.use_torch(
        Tensor,
        torch.nn.Parameter,
        torch.nn.Linear,
        torch.float32,
        GLOBAL_HOOKS,
        getattr(Tensor, "__dlpack_c_exchange_api__", None),
    )

max_layers = 16

NATIVE_ACTIVATIONS = ("identity", "relu", "elu", "silu", "tanh", "mish", "gelu", "sin", "cos")

Layer = tuple[int, int, int, int]

_LIBRARY = torch.library.Library("diffcore", "DEF")


def op(name: str, *, differentiable: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as the op ``torch.ops.diffcore.<name>``, for tensors on CPU and GPU.

    Its argument ``backend`` names the kernel that is to run. An op that isn't `differentiable` has
    results without a gradient, whatever its arguments require. The same as
    ``torch.library.custom_op``, without the layers of Python that this puts around every call; they
    took longer than a small network does. So does torch's dispatcher, which translates every argument
    to its own types and back: what is returned here goes through it only where that does anything.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(_with_typing_lists(function), mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CPU")
        _LIBRARY.impl(name, function, "CUDA")
        dispatched = getattr(torch.ops.diffcore, name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or _dispatching(args):
                if not torch.compiler.is_compiling():
                    _flops.teach_counters()
                if differentiable:
                    return dispatched(*args)
                with torch.no_grad():
                    return dispatched(*args)
            return function(*args)

        call.overload = dispatched  # type: ignore[attr-defined]
        call.kernel = function  # type: ignore[attr-defined]
        return call

    return register


def _with_typing_lists(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function's signature with ``typing.List`` for ``list``, which torch 2.6 wants there."""

    def older(kind: Any) -> Any:
        inner = tuple(map(older, get_args(kind)))
        if get_origin(kind) is list:
            return List[inner[0]]  # type: ignore[valid-type]  # noqa: UP006
        if get_origin(kind) is tuple:
            return tuple[inner]  # type: ignore[valid-type]
        return kind

    hints = {name: older(kind) for name, kind in get_type_hints(function).items()}
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=hints["return"]
    )
    return prototype


def _included_keys() -> int:
    return torch._C._dispatch_tls_local_include_set().raw_repr()


def _plain_keys() -> set[int]:
    """What a thread starts with, in inference mode and out of it."""
    keys = set()

    def look() -> None:
        for inference in (False, True):
            with torch.inference_mode(inference):
                keys.add(_included_keys())

    # In a thread of its own: this one may be in a mode while diffcore is imported.
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return keys


_PLAIN_KEYS = _plain_keys()
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def is_in_a_mode() -> bool:
    """Whether calls are met by a dispatch mode, a tracer or a transform, as FakeTensorMode is one."""
    return _included_keys() not in _PLAIN_KEYS


def _dispatching(args: tuple[Any, ...]) -> bool:
    """Whether torch's dispatcher would do anything about a call but hand it to its kernel.

    Modes, tracers and torch.func's transforms are entered in the thread's dispatch keys; the profiler
    wants to see the op; a subclass of Tensor may bring a meaning of its own, and a tensor to be read
    negated, as zeros, or through a wrapper hasn't in memory what it stands for.
    """
    if (
        is_in_a_mode()
        or torch._C._is_torch_function_mode_enabled()
        or torch.autograd._profiler_enabled()
    ):
        return True
    return _core is None or not _core.are_plain(args)


def is_undisturbed() -> bool:
    """Whether nothing but the op itself has a part in a call: no mode, tracer, transform, profiler,
    autocast or forward-mode derivative.
    """
    return _core is not None and not (
        torch.compiler.is_compiling()
        or is_in_a_mode()
        or torch._C._is_torch_function_mode_enabled()
        or torch.autograd._profiler_enabled()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
    )


def _quick_look(name: str, unknown: Any) -> Callable[..., Any]:
    """A look of the compiled module at tensors or layers, or a call if they are plain.

    Its answer is `unknown` for all that takes a closer look, and so it is for the compiler's tensors,
    which have no memory.
    """
    look = getattr(_core, name, None)

    def ask(*args: Any) -> Any:
        return unknown if look is None or torch.compiler.is_compiling() else look(*args)

    return ask


#: Whether it is a floating-point tensor of a shape, in which a text stands for any size.
fits: Callable[[Any, tuple[int | str, ...]], bool] = _quick_look("fits", False)

#: Whether tensors have rows of these widths, as many in each, and the dtype and device of a
#: diffcore.nn.MLP's weights.
inputs_fit: Callable[[list[Any], tuple[int, ...], Any], bool] = _quick_look("inputs_fit", False)

#: Whether all of a list's tensors are float32 on the CPU, and where that is asked for contiguous.
are_float32_on_cpu: Callable[[Any, bool], bool] = _quick_look("are_float32_on_cpu", False)

#: Whether they are float32 on the CPU and nothing but their memory says what their values are.
are_plain_float32_on_cpu: Callable[[list[Any]], bool]
are_plain_float32_on_cpu = _quick_look("are_plain_float32_on_cpu", False)

#: Whether lists of weights and biases, float32 on the CPU, fit so many inputs and each other.
layers_fit: Callable[[Any, Any, int], bool] = _quick_look("layers_fit", False)

#: Whether a tensor on the CPU has no memory for its values.
lacks_memory: Callable[[Tensor], bool] = _quick_look("lacks_memory", False)

#: Whether two lists of tensors, float32 on the CPU, have the same sizes.
same_sizes: Callable[[Any, Any], bool] = _quick_look("same_sizes", False)

#: The index of the first of some tensors that shares memory with one of others, which a call changes;
#: how many they are where two of those others do; else None.
sharing: Callable[[list[Tensor], list[Tensor]], int | None] = _quick_look("sharing", None)

#: [weight, bias, weight, bias, ...] of a dictionary of so many torch.nn.Linear with these inputs and
#: outputs (None: any), or None where they are more than that, by hooks for instance, or don't fit.
linear_stack: Callable[[Any, int, int | None, int | None], list[Tensor] | None]
linear_stack = _quick_look("linear_stack", None)

#: The same of a diffcore.nn.MLP's layers; its class is given too.
mlp_stack: Callable[[Any, type, int | None, int | None], list[Tensor] | None]
mlp_stack = _quick_look("mlp_stack", None)

#: The same of some of a module's diffcore.nn.MLP, named with their inputs and outputs; None as well
#: where the module is more than its class, an MLP has another activation, or there are global hooks;
#: and if only plain tensors are wanted, as above, where not all are.
mlp_stacks: Callable[
    [Any, type, tuple[tuple[str, int, int], ...], type, str, bool], list[list[Tensor]] | None
]
mlp_stacks = _quick_look("mlp_stacks", None)


#: The result of :func:`diffcore.ops.mlp` for its arguments (and whether to multiply in bfloat16,
#: whether gradients are recorded, threads), in one call of the compiled module. None where anything
#: about an argument takes a closer look; True where nothing does, but a gradient is wanted.
plain_mlp: Callable[[Any, Any, Any, Any, bool, bool, int], Tensor | bool | None]
plain_mlp = _quick_look("plain_mlp", None)

#: The same of :func:`diffcore.ops.mlp_ensemble`.
plain_mlp_ensemble: Callable[[Any, Any, Any, bool, bool, int], Tensor | bool | None]
plain_mlp_ensemble = _quick_look("plain_mlp_ensemble", None)

#: The same of :func:`diffcore.ops.rff_features`.
plain_rff_features: Callable[[Any, Any, Any, str, float, bool, int], Tensor | bool | None]
plain_rff_features = _quick_look("plain_rff_features", None)


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be taken in any of these of what is computed now."""
    return torch.is_grad_enabled() and any(map(requires_gradient, tensors))


def requires_gradient(tensor: Tensor | None) -> bool:
    """``tensor.requires_grad``, which torch.func.vmap hides from who looks at its slices."""
    if tensor is None or tensor.requires_grad or torch.compiler.is_compiling():
        return tensor is not None and tensor.requires_grad
    return _is_wrapped(tensor) and requires_gradient(torch._C._functorch.get_unwrapped(tensor))


_FAKES: dict[str, Callable[..., Any]] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Any]:
    """What the op's results look like, for torch.compile and a vmap over nothing: a rule by names of
    arguments.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        _FAKES[name] = by_name(name, rule)
        torch.library.register_fake(f"diffcore::{name}", _FAKES[name], lib=_LIBRARY)
        return rule

    return register


def vmap(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers the op's rule for torch.func.vmap, and for the older vmap that torch still has.

    That one is behind ``torch.autograd.grad(..., is_grads_batched=True)``. The rule is for a batch of
    at least one.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        def of_any_size(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            if info.batch_size == 0:
                return _over_nothing(_FAKES[name], in_dims, args)
            return rule(info, in_dims, *args)

        torch.library.register_vmap(f"diffcore::{name}", of_any_size, lib=_LIBRARY)
        _LIBRARY.impl(name, functools.partial(_in_older_vmap, rule), "Batched")
        return rule

    return register


def _over_nothing(looks: Callable[..., Any], in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Results of a vmap over an empty batch. `looks`: the op's fake, which says it of one element."""

    def element(value: Tensor, dim: int) -> Tensor:
        return value.new_empty(value.movedim(dim, 0).shape[1:])

    results = looks(*_elements(in_dims, args, element))
    empty = tree_map(lambda result: result.new_empty(0, *result.shape), results)
    return empty, tree_map(lambda _: 0, results)


def is_batch_of_gradients(value: Any) -> bool:
    """Whether it is batched by the older vmap."""
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


class _VmapInfo(NamedTuple):
    """What a rule asks of the first argument that torch.func.vmap gives it."""

    batch_size: int


def _in_older_vmap(rule: Callable[..., Any], *args: Any) -> Any:
    """Results of an op on what the older vmap has batched, by the rule for torch.func's."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    sizes = set()

    def unwrapped(value: Any) -> tuple[Any, Any]:
        """(it, the dimension in which it is batched)"""
        if isinstance(value, list):
            values = [unwrapped(v) for v in value]
            return [v for v, _ in values], [dim for _, dim in values]
        if not is_batch_of_gradients(value):
            return value, None
        batch = torch._remove_batch_dim(value, level, 0, 0)  # empty if batched elsewhere
        sizes.add(len(batch))
        return batch, 0

    def wrapped(result: Any, dim: Any) -> Any:
        if isinstance(result, (list, tuple)):
            return type(result)(map(wrapped, result, dim))
        return result if dim is None else torch._add_batch_dim(result, dim, level)

    values, dims = zip(*map(unwrapped, args), strict=True)
    if 0 in sizes:
        raise RuntimeError("is_grads_batched: expected no other vmap around that of the gradients")
    return wrapped(*rule(_VmapInfo(*sizes), dims, *values))


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` for a Function with setup_context, the only kind torch.func takes.

    In plain eager mode it runs as a twin of the older kind: torch binds the arguments of the newer
    one by inspecting its signature at every call, which takes longer than a small network does.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return _eager_twin(function).apply(*args)


@functools.cache
def _eager_twin(function: Any) -> Any:
    class Twin(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = function.forward(*args)
            function.setup_context(ctx, args, output)
            return output

        backward = staticmethod(function.backward)

    Twin.__name__ = Twin.__qualname__ = function.__name__
    return Twin


def gradients(op: str, compute: Callable[..., Sequence[Tensor]], *args: Any) -> Sequence[Tensor]:
    """``compute(*args)``, the gradients of an op, such that differentiating them is refused.

    `args` must name every tensor that the gradients depend on, or a second derivative would be
    silently wrong instead.
    """
    # The compiler has no second derivatives anyway.
    if torch.compiler.is_compiling() or nothing_is_differentiated():
        return compute(*args)
    if torch.is_grad_enabled() and any(map(is_batch_of_gradients, args)):
        # That vmap would lose the node that refuses.
        raise RuntimeError(_no_second_derivative(op))
    results: Sequence[Tensor] = apply(_FirstDerivative, op, compute, *args)
    return results


def nothing_is_differentiated() -> bool:
    """Whether no derivative can be taken of what is computed now, as in a plain ``backward()``."""
    return not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class _FirstDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, compute: Callable[..., Sequence[Tensor]], *args: Any) -> Any:
        return tuple(compute(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_no_second_derivative(ctx.op))


def _no_second_derivative(op: str) -> str:
    return (
        f"{op}: the fused kernel has no second derivative; "
        "pass backend='reference' to differentiate twice"
    )


def layers(parameters: list[Tensor], backend: str) -> list[Tensor] | list[Layer]:
    """[weight, bias, weight, bias, ...] as a backend's module takes them.

    The CUDA kernels' takes (weight address, bias address, in, out); the tensors must be contiguous
    and stay alive during the call.
    """
    if backend == "cpu":
        return parameters
    pointers = list(map(Tensor.data_ptr, parameters))
    sizes = map(Tensor.size, parameters[::2])
    return [
        (weight, bias, size[1], size[0])
        for weight, bias, size in zip(pointers[::2], pointers[1::2], sizes, strict=True)
    ]


def widths(parameters: list[Tensor]) -> list[int]:
    """Of the input and of every layer of a network [weight, bias, weight, bias, ...]."""
    return [parameters[0].shape[1], *(weight.shape[0] for weight in parameters[::2])]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def cuda_lacks() -> str | None:
    """Why the CUDA kernels can't run on the current device, or why nobody can tell; else None."""
    try:
        reason: str | None = _cuda.unavailable()
    except RuntimeError as error:
        return str(error)
    return reason


def device_index(tensor: Tensor) -> int:
    """Of a GPU; for the CPU -1, with which ``torch.cuda.device`` changes nothing."""
    return -1 if tensor.is_cpu else tensor.device.index


def stream(tensor: Tensor) -> int:
    """The stream on which the work of a call with this tensor is queued."""
    if tensor.is_cpu:  # the CUDA kernels' build for the CPU
        return 0
    address: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return address


def workspace(size: int, like: Tensor) -> Tensor:
    """Memory of that many bytes on a tensor's device."""
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def seed_words(seed: Tensor | None) -> tuple[int, int]:
    """(value, device address) of a seed for a GPU kernel, one of them 0.

    A seed on the device is read by the kernel: nothing waits for it here, and a captured CUDA graph
    reads the next one at every replay.
    """
    if seed is None:
        return 0, 0
    return (int(seed) % 2**64, 0) if seed.is_cpu else (0, seed.data_ptr())


def folded(value: Tensor | None, dim: int | None, size: int, rows: int = 0) -> Tensor | None:
    """What a vmap over so many elements has batched in `dim`, as part of its dimension `rows`."""
    if value is None:
        return None
    value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.movedim(0, rows).flatten(rows, rows + 1)


def one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for vmap: the op for every element, where they can't be folded into the rows."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _stacked(
            [
                op(*_elements(in_dims, args, functools.partial(torch.select, index=i)))
                for i in range(info.batch_size)
            ]
        )

    return rule


def _elements(
    in_dims: Sequence[Any], args: Sequence[Any], element: Callable[[Tensor, int], Tensor]
) -> list[Any]:
    """The arguments with ``element(tensor, dim)`` for those that a vmap has batched."""

    def of_argument(value: Any, dim: Any) -> Any:
        if isinstance(value, list):
            return _elements(dim, value, element)
        return value if dim is None else element(value, dim)

    return [of_argument(value, dim) for value, dim in zip(args, in_dims, strict=True)]


def _stacked(results: Sequence[Any]) -> tuple[Any, Any]:
    """(an op's results of every element stacked, the dimensions in which they are)."""
    kind = type(results[0])
    if issubclass(kind, Tensor):
        return torch.stack([*results]), 0
    columns = [_stacked(column) for column in zip(*results, strict=True)]
    return kind(stack for stack, _ in columns), kind(dim for _, dim in columns)
