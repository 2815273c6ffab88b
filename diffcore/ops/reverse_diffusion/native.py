"""The reverse chain on the kernels, as a torch op with a backward op of its own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native
from diffcore.ops._activations import ACTIVATIONS
from diffcore.ops._compile import constant_under_compile


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
        queue = _native.queue(state)
        size = module.reverse_diffusion_workspace(*denoiser, steps, batch, queue[0])
        workspace = _native.workspace(size, state)
        noise_settings = (seed_value, seed_address, noise_scale, clip)
        module.reverse_diffusion(
            *denoiser, *chain, *noise_settings, *results, workspace.data_ptr(), queue
        )
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
    plan = cuda.reverse_diffusion_plan(layers, *settings, 1, 1, device)  # any steps, any batch
    return plan if isinstance(plan, str) else None


@_native.fake("reverse_diffusion")
def _(
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
) -> list[Tensor]:
    """Gradients of [state, x_init, noise (empty unless wanted), *parameters].

    Step by step backwards from the stored x: the denoiser is run again in float32, and its
    vector-Jacobian product taken by hand.
    """
    steps, batch, action_dim = coefficients.shape[0], state.shape[0], grad_actions.shape[1]
    function = ACTIVATIONS[activation]
    state_offset = parameters[4].shape[1] - state.shape[1]
    grads = [torch.zeros_like(p) for p in parameters]
    grad_state = torch.zeros_like(state)
    grad_noise = state.new_empty(steps if wants_noise else 0, batch, action_dim)

    x_end = trajectory[steps]
    grad_x = grad_actions * ((x_end >= -clip) & (x_end <= clip))
    grad_x0_of_previous = torch.zeros_like(grad_x)
    # Float32 like the way there, whatever autocast is on.
    with torch.autocast(state.device.type, enabled=False):
        for i in range(steps - 1, -1, -1):
            c0, c1, c2, c3, c4, c5, c6 = coefficients[i].unbind()
            x = trajectory[i]

            # eps = denoiser(x, state, t), keeping what the way back needs.
            time_inputs, time_pre = _mlp(embedding[i : i + 1], parameters[:4], function.forward)
            time_features = time_pre[-1].expand(batch, -1)
            trunk_input = torch.cat([x, time_features, state], dim=1)
            inputs, pre = _mlp(trunk_input, parameters[4:], function.forward)
            eps = pre[-1]

            # x' = c2 clip(c0 x - c1 eps) + c3 x + c4 eps + c5 z + c6 x0'
            if wants_noise:
                grad_noise[i] = grad_x * (c5 * noise_scale)
            unclipped = c0 * x - c1 * eps
            inside = (unclipped >= -clip) & (unclipped <= clip)
            grad_x0 = (c2 * grad_x + grad_x0_of_previous) * inside
            grad_x0_of_previous = c6 * grad_x
            grad_eps = c4 * grad_x - c1 * grad_x0
            grad_x = c3 * grad_x + c0 * grad_x0

            grad_input = _mlp_backward(
                grad_eps, inputs, pre, parameters[4:], function.backward, grads[4:]
            )
            grad_x = grad_x + grad_input[:, :action_dim]
            grad_state += grad_input[:, state_offset:]
            grad_time = grad_input[:, action_dim:state_offset].sum(0, keepdim=True)
            _mlp_backward(
                grad_time, time_inputs, time_pre, parameters[:4], function.backward, grads[:4]
            )
    return [grad_state, grad_x, grad_noise, *grads]


def _mlp(x: Tensor, parameters: list[Tensor], activation: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(inputs, pre-activations) of every layer; the last pre-activation is the output."""
    inputs: list[Tensor] = []
    pre: list[Tensor] = []
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        if pre:
            x = activation(pre[-1])
        inputs.append(x)
        pre.append(torch.addmm(bias, x, weight.T))
    return inputs, pre


def _mlp_backward(
    grad: Tensor,
    inputs: list[Tensor],
    pre: list[Tensor],
    parameters: list[Tensor],
    activation_backward: Any,
    grads: list[Tensor],
) -> Tensor:
    """Gradient at the input; parameter gradients are added to `grads`."""
    for layer in range(len(pre) - 1, -1, -1):
        if layer < len(pre) - 1:
            grad = activation_backward(grad, pre[layer])
        grads[2 * layer].addmm_(grad.T, inputs[layer])
        grads[2 * layer + 1].add_(grad.sum(0))
        grad = grad @ parameters[2 * layer]
    return grad


@_native.fake("reverse_diffusion_backward")
def _(
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
) -> list[Tensor]:
    steps = coefficients.shape[0] if wants_noise else 0
    return [
        torch.empty_like(state),
        torch.empty_like(grad_actions),
        state.new_empty(steps, *grad_actions.shape),
        *[torch.empty_like(p) for p in parameters],
    ]


@_native.vmap("reverse_diffusion_backward")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """One by one: every element has parameter gradients of its own."""
    results = _native.one_by_one(chain_backward, info.batch_size, in_dims, args)
    stacked = [torch.stack(column) for column in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


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
        ctx.noise_scale, ctx.clip, ctx.activation, _precision, _backend, *parameters = rest
        ctx.has_x_init, ctx.has_noise = x_init is not None, noise is not None
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros as large as what is kept
        ctx.save_for_backward(output[1], state, x_init, noise, coefficients, embedding, *parameters)

    @staticmethod
    def backward(ctx: Any, grad_actions: Tensor, _: Tensor) -> Any:
        trajectory, state, x_init, noise, coefficients, embedding, *parameters = ctx.saved_tensors
        wants_noise = ctx.has_noise and ctx.needs_input_grad[2]
        settings = (coefficients, embedding, ctx.noise_scale, ctx.clip, ctx.activation, wants_noise)
        # x_init and noise: the gradients depend on them through the trajectory.
        arguments = (grad_actions, trajectory, state, x_init, noise, *settings, *parameters)
        grads = _native.gradients("reverse_diffusion", _gradients, *arguments)
        grad_state, grad_x, grad_noise, *grad_parameters = grads
        return (
            grad_state,
            grad_x if ctx.has_x_init else None,
            grad_noise if wants_noise else None,
            *[None] * 8,
            *grad_parameters,
        )


def _gradients(
    grad_actions: Tensor,
    trajectory: Tensor,
    state: Tensor,
    x_init: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    embedding: Tensor,
    noise_scale: float,
    clip: float,
    activation: str,
    wants_noise: bool,
    *parameters: Tensor,
) -> list[Tensor]:
    settings = (coefficients, embedding, noise_scale, clip, activation, wants_noise)
    return chain_backward(grad_actions, trajectory, state, list(parameters), *settings)


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
        results = _native.one_by_one(chain, size, in_dims, args)
        actions, trajectory = (torch.stack(column) for column in zip(*results, strict=True))
        return (actions, trajectory), (0, 0)

    def fold(value: Tensor | None, dim: int | None, rows: int) -> Tensor | None:
        """The batch of the vmap as part of dimension `rows`."""
        if value is None:
            return None
        value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.movedim(0, rows).flatten(rows, rows + 1)

    actions, trajectory = chain(
        fold(state, state_dim, 0),
        fold(x_init, x_dim, 0),
        fold(noise, noise_dim, 1),
        None,
        parameters,
        *fixed,
    )
    return (actions.unflatten(0, (size, -1)), trajectory.unflatten(1, (size, -1))), (0, 1)
