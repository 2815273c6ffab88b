"""The reverse chain on the kernels, as a torch op with a backward op of its own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from diffcore._kept import constant_under_compile
from diffcore.ops import _native
from diffcore.ops._activations import ACTIVATIONS
from diffcore.ops._flops import Shape, flops, mlps, mlps_backward
from diffcore.ops.mlp import native as mlp


@_native.op("reverse_diffusion")
def chain(
    state: Tensor,
    x_init: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    parameters: list[Tensor],
    coefficients: Tensor,
    embedding: Tensor,
    noise_scale: float,
    clip: float,
    activation: str,
    precision: str,
    keep_trajectory: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(actions ``[B, A]``, x before every step and at the end ``[steps + 1, B, A]`` or empty)."""
    module = _native._cuda if backend == "cuda" else _native._core
    if backend != "cpu":  # whose module sees to that itself
        parameters = [p.contiguous() for p in parameters]
    state = state.contiguous()
    x_init = None if x_init is None else x_init.contiguous()
    noise = None if noise is None else noise.contiguous()
    batch, steps = state.shape[0], coefficients.shape[0]
    action_dim = parameters[-1].shape[0]
    actions = state.new_empty(batch, action_dim)
    trajectory = state.new_empty(steps + 1 if keep_trajectory else 0, batch, action_dim)
    if not batch:
        return actions, trajectory
    if backend == "triton":
        from diffcore.ops.reverse_diffusion import triton

        triton.reverse_diffusion(
            state,
            x_init,
            noise,
            seed,
            parameters,
            coefficients,
            embedding,
            noise_scale,
            clip,
            activation,
            precision,
            trajectory if keep_trajectory else None,
            actions,
        )
        return actions, trajectory
    denoiser = (
        _native.layers(parameters, backend),
        action_dim,
        state.shape[1],
        getattr(module.Activation, activation),
        getattr(module.Precision, precision),
    )
    chain = (
        embedding.data_ptr(),
        steps,
        coefficients.data_ptr(),
        batch,
        state.data_ptr(),
        _native.address(x_init),
        _native.address(noise),
    )
    results = (trajectory.data_ptr() if keep_trajectory else 0, actions.data_ptr())
    seed_value, seed_address = _native.seed_words(seed)
    if backend == "cuda":
        noise_settings = (seed_value, seed_address, noise_scale, clip)
        with torch.cuda.device_of(state):
            size = module.reverse_diffusion_workspace(*denoiser, steps, batch)
            workspace = _native.workspace(size, state)
            memory = workspace.data_ptr(), workspace.numel(), _native.stream(state)
            module.reverse_diffusion(*denoiser, *chain, *noise_settings, *results, *memory)
    else:
        module.reverse_diffusion(
            *denoiser, *chain, seed_value, noise_scale, clip, *results, torch.get_num_threads()
        )
    return actions, trajectory


@constant_under_compile
def why_not_cuda(
    widths: list[list[int]], state_dim: int, precision: str, device: int
) -> str | None:
    """Why the CUDA kernel can't take layers of these widths ([time MLP's, trunk's]), or None."""
    cuda = _native._cuda
    layers = [(0, 0, *sizes) for mlp in widths for sizes in itertools.pairwise(mlp)]
    settings = widths[-1][-1], state_dim, getattr(cuda.Precision, precision)
    with torch.cuda.device(device):
        plan = cuda.reverse_diffusion_plan(layers, *settings, 1, 1)  # any steps, any batch
    return plan if isinstance(plan, str) else None


@_native.fake("reverse_diffusion")
def _(
    state: Tensor, parameters: list[Tensor], coefficients: Tensor, keep_trajectory: bool
) -> tuple[Tensor, Tensor]:
    action_dim = parameters[-1].shape[0]
    steps = coefficients.shape[0] + 1 if keep_trajectory else 0
    return (
        state.new_empty(state.shape[0], action_dim),
        state.new_empty(steps, state.shape[0], action_dim),
    )


@_native.op("reverse_diffusion_backward")
def chain_backward(
    grad_actions: Tensor,
    trajectory: Tensor,
    state: Tensor,
    parameters: list[Tensor],
    coefficients: Tensor,
    embedding: Tensor,
    noise_scale: float,
    clip: float,
    activation: str,
    wants_noise: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of [state, x_init, noise (empty unless wanted), *parameters].

    Step by step backwards from the stored x: the denoiser is run again in float32, and its
    vector-Jacobian product taken by hand.
    """
    # The results lie as these do, and are to lie row by row.
    grad_actions, state = grad_actions.contiguous(), state.contiguous()
    steps, batch, action_dim = coefficients.shape[0], state.shape[0], grad_actions.shape[1]
    state_offset = parameters[4].shape[1] - state.shape[1]
    time_mlp = _MLP(parameters[:4], activation, backend)
    trunk = _MLP(parameters[4:], activation, backend)
    trunk_grads = [torch.zeros_like(p) for p in trunk.parameters]
    grad_state = torch.zeros_like(state)
    grad_noise = state.new_empty(steps if wants_noise else 0, batch, action_dim)

    x_end = trajectory[steps]
    grad_x = grad_actions * ((x_end >= -clip) & (x_end <= clip))
    grad_x0_of_previous = torch.zeros_like(grad_x)
    # Float32 like the way there, whatever autocast is on.
    with torch.autocast(state.device.type, enabled=False):
        time_features, time_saved = time_mlp.forward(embedding)
        grad_time_features = torch.empty_like(time_features)
        for i in range(steps - 1, -1, -1):
            c0, c1, c2, c3, c4, c5, c6 = coefficients[i].unbind()
            x = trajectory[i]
            trunk_input = torch.cat([x, time_features[i].expand(batch, -1), state], dim=1)
            eps, saved = trunk.forward(trunk_input)

            # x' = c2 clip(c0 x - c1 eps) + c3 x + c4 eps + c5 z + c6 x0'
            if wants_noise:
                grad_noise[i] = grad_x * (c5 * noise_scale)
            unclipped = c0 * x - c1 * eps
            inside = (unclipped >= -clip) & (unclipped <= clip)
            grad_x0 = (c2 * grad_x + grad_x0_of_previous) * inside
            grad_x0_of_previous = c6 * grad_x
            grad_eps = c4 * grad_x - c1 * grad_x0
            grad_x = c3 * grad_x + c0 * grad_x0

            grad_input, grads = trunk.backward(grad_eps, trunk_input, saved)
            torch._foreach_add_(trunk_grads, grads)
            grad_x = grad_x + grad_input[:, :action_dim]
            grad_time_features[i] = grad_input[:, action_dim:state_offset].sum(0)
            grad_state += grad_input[:, state_offset:]
        _, time_grads = time_mlp.backward(grad_time_features, embedding, time_saved)
    return [grad_state, grad_x, grad_noise, *time_grads, *trunk_grads]


class _MLP:
    """A part of a denoiser, forward and back in float32.

    On the CPU by :func:`diffcore.ops.mlp`'s kernels, whose results know neither threads nor, row by
    row, the batch; elsewhere by torch.
    """

    def __init__(self, parameters: list[Tensor], activation: str, backend: str) -> None:
        self.parameters, self.on_cpu = [p.contiguous() for p in parameters], backend == "cpu"
        self.kinds = [*[activation] * (len(parameters) // 2 - 1), "identity"]
        self.names = ",".join(self.kinds)
        # Of one pass, written anew by every other: for wide layers fresh memory takes longer.
        self.grads = [torch.empty_like(p) for p in self.parameters] if self.on_cpu else []

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """y, and what the way back needs."""
        if self.on_cpu:
            y, saved = mlp.run_forward(x, self.parameters, self.names, True, "float32", "cpu")
            return y[0], saved
        inputs, pre = [], []
        pairs = zip(self.parameters[::2], self.parameters[1::2], self.kinds, strict=True)
        for weight, bias, kind in pairs:
            inputs.append(x)
            pre.append(torch.addmm(bias, x, weight.T))
            x = ACTIVATIONS[kind].forward(pre[-1])
        return x, (inputs, pre)

    def backward(self, grad: Tensor, x: Tensor, saved: Any) -> tuple[Tensor, list[Tensor]]:
        """Gradients of x and, until the next pass, of the parameters."""
        if self.on_cpu and x.shape[0]:
            x = x.contiguous()
            grad_x = torch.empty_like(x)
            rest = (saved, self.parameters, self.names, "float32")
            mlp.backward_into(grad_x, self.grads, grad.contiguous(), x, *rest)
            return grad_x, self.grads
        if self.on_cpu:
            return torch.empty_like(x), [torch.zeros_like(p) for p in self.parameters]
        grads: list[Tensor] = []
        layers = zip(self.parameters[::2], self.kinds, *saved, strict=True)
        for weight, kind, inputs, pre in reversed([*layers]):
            grad = ACTIVATIONS[kind].backward(grad, pre)
            grads[:0] = [grad.T @ inputs, grad.sum(0)]
            grad = grad @ weight
        return grad, grads


@_native.fake("reverse_diffusion_backward")
def _(
    grad_actions: Tensor,
    state: Tensor,
    parameters: list[Tensor],
    coefficients: Tensor,
    wants_noise: bool,
) -> list[Tensor]:
    steps = coefficients.shape[0] if wants_noise else 0
    return [
        state.new_empty(state.shape),
        grad_actions.new_empty(grad_actions.shape),
        state.new_empty(steps, *grad_actions.shape),
        *[p.new_empty(p.shape) for p in parameters],
    ]


@flops("reverse_diffusion")
def _(state: Shape, parameters: list[Shape], coefficients: Shape) -> int:
    return coefficients[0] * mlps(state[0], parameters)


@flops("reverse_diffusion_backward")
def _(state: Shape, parameters: list[Shape], coefficients: Shape) -> int:
    # The op computes the gradients of all parameters, frozen ones too.
    time_mlp, trunk = parameters[:4], parameters[4:]
    return coefficients[0] * (
        mlps_backward(state[0], time_mlp, 2, False, True)
        + mlps_backward(state[0], trunk, len(trunk) // 2, True, True)
    )


# Every element has parameter gradients of its own.
_native.vmap("reverse_diffusion_backward")(_native.one_by_one(chain_backward))


class Chain(torch.autograd.Function):
    """The op with its gradient; a Function, since torch.func takes no other kind."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        state: Tensor,
        x_init: Tensor | None,
        noise: Tensor | None,
        seed: Tensor | None,
        coefficients: Tensor,
        embedding: Tensor,
        noise_scale: float,
        clip: float,
        activation: str,
        precision: str,
        backend: str,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        settings = (coefficients, embedding, noise_scale, clip, activation, precision)
        return chain(state, x_init, noise, seed, list(parameters), *settings, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        state, x_init, noise, _seed, coefficients, embedding, *rest = inputs
        ctx.noise_scale, ctx.clip, ctx.activation, _precision, ctx.backend, *parameters = rest
        ctx.has_x_init, ctx.has_noise = x_init is not None, noise is not None
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(output[1], state, x_init, noise, coefficients, embedding, *parameters)

    @staticmethod
    def backward(ctx: Any, grad_actions: Tensor, _: Tensor) -> Any:
        wants_noise = ctx.has_noise and ctx.needs_input_grad[2]
        settings = (ctx.noise_scale, ctx.clip, ctx.activation, wants_noise, ctx.backend)

        def compute(grad_actions: Tensor, trajectory: Tensor, state: Tensor, *rest: Any) -> Any:
            # The gradients depend on x_init and noise through the trajectory.
            _x_init, _noise, coefficients, embedding, *parameters = rest
            tables = (coefficients, embedding)
            return chain_backward(grad_actions, trajectory, state, parameters, *tables, *settings)

        grads = _native.gradients("reverse_diffusion", compute, grad_actions, *ctx.saved_tensors)
        grad_state, grad_x, grad_noise, *grad_parameters = grads
        return (
            grad_state,
            grad_x if ctx.has_x_init else None,
            grad_noise if wants_noise else None,
            *[None] * 8,
            *grad_parameters,
        )


@_native.vmap("reverse_diffusion")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """Batched state, x_init and noise are folded into the rows; batched parameters, and noise drawn
    inside (by row, so that folding would give every element its own), run one by one."""
    state_dim, x_dim, noise_dim, _seed_dim, parameter_dims, *fixed_dims = in_dims
    state, x_init, noise, seed, parameters, *fixed = args
    size = info.batch_size
    if any(d is not None for d in fixed_dims):
        raise ValueError("reverse_diffusion: vmap over the schedule isn't supported")
    if seed is not None or any(d is not None for d in parameter_dims):
        return _native.one_by_one(chain)(info, in_dims, *args)
    actions, trajectory = chain(
        _native.folded(state, state_dim, size),
        _native.folded(x_init, x_dim, size),
        _native.folded(noise, noise_dim, size, rows=1),
        None,
        parameters,
        *fixed,
    )
    return (actions.unflatten(0, (size, -1)), trajectory.unflatten(1, (size, -1))), (0, 1)
