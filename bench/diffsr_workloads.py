"""What is compared for Diff-SR: its ops, and a whole update."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import eager
import eager_diffsr
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from workloads import (
    ALL_RIVALS,
    BASELINE,
    COMPILED,
    JAX,
    OPTIMISED,
    OURS,
    OURS_BF16,
    OURS_NEW_WEIGHTS,
    SEED,
    SIZES,
    Case,
    Error,
    Result,
    Rivals,
    Variant,
    change_weights,
    flat,
    forward_and_backward,
    random_replay,
)

from diffcore import ops
from diffcore.agents import Batch, DiffSR, DiffSRConfig
from diffcore.nn import Psi, SquashedGaussian, TwinRFFCritic

FEATURES, RANDOM_FEATURES, ZETA_HIDDEN = 256, 1024, 512
UPDATE_SIZES = (
    ("Pendulum-v1", 256),
    ("HalfCheetah-v5", 256),
    ("HalfCheetah-v5", 1024),
    ("Humanoid-v4", 256),
)
"""Environment and batch of the updates that a whole run compares; the larger ones take minutes and
are for pytest bench/bench_diffsr_update.py."""
CHECK_EPS = 1e-3
"""Adam's epsilon in checks of an update: with 1e-8 it makes a full step of a gradient that is all
rounding."""


def in_scale(result: Result, scales: Sequence[float]) -> Tensor:
    """The result as one vector, each tensor divided by its scale: errors become relative."""
    return flat(r / scale for r, scale in zip(result, scales, strict=True))


def scales_of(result: Result) -> list[float]:
    """Each tensor's root mean square."""
    return [r.detach().square().mean().sqrt().item() for r in result]


def rff_features_case(batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """Random Fourier features, gradients of input, frequencies and phases included."""
    torch.manual_seed(SEED)
    x = torch.randn(batch, FEATURES)
    layer = nn.Linear(FEATURES, RANDOM_FEATURES)
    retrained = copy.deepcopy(layer)
    inputs = [x.requires_grad_(), layer.weight, layer.bias]
    grad = torch.randn(batch, RANDOM_FEATURES)

    def as_written(x: Tensor, omega: Tensor, bias: Tensor) -> Tensor:
        return torch.sin(linear(x, omega, bias))

    def run(function: Callable[..., Tensor], layer: nn.Linear = layer) -> Result:
        return forward_and_backward(function, [x, layer.weight, layer.bias], grad)

    scales = scales_of(run(as_written))

    def variant(name: str, function: Callable[..., Tensor]) -> Variant:
        return Variant(name, lambda: run(function), lambda: in_scale(run(function), scales))

    jax = rivals.jax_baselines()
    in_jax = jax and jax.ForwardAndBackward(jax.rff_features, inputs, grad)
    variants = [
        variant(BASELINE, as_written),
        variant(COMPILED, torch.compile(as_written, dynamic=False)),
        jax and Variant(JAX, in_jax, lambda: in_scale(in_jax.on(), scales)),
        variant(OURS, ops.rff_features),
        Variant(
            OURS_NEW_WEIGHTS,
            lambda: run(ops.rff_features, retrained),
            lambda: in_scale(run(ops.rff_features, retrained), scales),
            before=lambda: change_weights(retrained),
        ),
    ]

    def exact() -> Tensor:
        double = [i.detach().double().requires_grad_() for i in inputs]
        return in_scale(forward_and_backward(as_written, double, grad), scales)

    return Case(
        "rff_features",
        FEATURES,
        batch,
        1,
        rivals.admit(variants),
        exact,
        flops=2.0 * 3 * batch * FEATURES * RANDOM_FEATURES,
    )


def squashed_gaussian_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """A policy's sample and its log density, with the gradients of all parameters."""
    torch.manual_seed(SEED)
    state_dim, action_dim = SIZES[env]
    policy = SquashedGaussian(state_dim, action_dim)
    retrained, in_bf16 = copy.deepcopy(policy), copy.deepcopy(policy)
    in_bf16.trunk.compute_dtype = torch.bfloat16
    bounds, low, high = policy.log_std_bounds, *policy.log_std_bounds
    as_written = eager_diffsr.Actor(eager.sequential(policy.trunk), bounds)
    state, noise = torch.randn(batch, state_dim), torch.randn(batch, action_dim)
    grads = torch.randn(batch, action_dim), torch.randn(batch, 1)
    Sample = Callable[..., tuple[Tensor, Tensor]]

    def by_distribution(actor: nn.Module, state: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        distribution = actor(state)
        if z is None:
            action = distribution.rsample()
        else:
            normal = distribution.base_dist
            action = distribution.transforms[0](normal.loc + normal.scale * z)
        return action, distribution.log_prob(action).sum(-1, keepdim=True)

    def optimised(actor: nn.Module, state: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = actor.trunk(state).chunk(2, dim=-1)
        log_std = low + 0.5 * (high - low) * (raw.tanh() + 1)
        u = mean + log_std.exp() * z
        slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        density = -0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi) - slope
        return u.tanh(), density.sum(-1, keepdim=True)

    def run(sample: Sample, of: nn.Module, x: Tensor, z: Tensor | None) -> Result:
        results = sample(of, x, z)
        weights = [g.to(x.dtype) for g in grads]
        return *results, *torch.autograd.grad(results, list(of.parameters()), weights)

    scales = scales_of(run(by_distribution, as_written, state, noise))

    def variant(name: str, sample: Sample, of: nn.Module, **more: Any) -> Variant:
        def call() -> Result:
            z = None if sample is by_distribution else torch.randn(batch, action_dim)
            return run(sample, of, state, z)

        return Variant(name, call, lambda: in_scale(run(sample, of, state, noise), scales), **more)

    def ours(policy: SquashedGaussian, state: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return policy.sample(state, z)

    def in_jax() -> Variant | None:
        if not (jax := rivals.jax_baselines()):
            return None

        def of_parameters(*arrays: Any) -> Any:
            *parameters, x, z = arrays
            return jax.squashed_gaussian(jax.as_layers(parameters), x, z, bounds)

        parameters = list(policy.parameters())
        grad = torch.cat(grads, dim=1)
        call = jax.ForwardAndBackward(of_parameters, parameters, grad, state, noise)

        def given() -> Tensor:
            values, *gradients = call.on()
            return in_scale([*values.split([action_dim, 1], dim=1), *gradients], scales)

        return Variant(JAX, call, given)

    variants = [
        variant(BASELINE, by_distribution, as_written),
        variant(OPTIMISED, optimised, as_written),
        variant(COMPILED, torch.compile(optimised, dynamic=False), as_written),
        in_jax(),
        variant(OURS, ours, policy),
        variant(OURS_NEW_WEIGHTS, ours, retrained, before=lambda: change_weights(retrained)),
        variant(OURS_BF16, ours, in_bf16),
    ]

    def exact() -> Tensor:
        double = copy.deepcopy(as_written).double()
        return in_scale(run(by_distribution, double, state.double(), noise.double()), scales)

    sizes = [(layer.in_features, layer.out_features) for layer in policy.trunk.layers]
    products = 3 * sum(i * o for i, o in sizes) - sizes[0][0] * sizes[0][1]
    return Case(
        "squashed_gaussian",
        state_dim,
        batch,
        1,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(1e-2, 1.0),
        flops=2.0 * batch * products,
    )


def soft_value_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """The loss of a policy that psi and two critics judge, with the gradients of its parameters."""
    torch.manual_seed(SEED)
    state_dim, action_dim = SIZES[env]
    policy = SquashedGaussian(state_dim, action_dim)
    judges = nn.ModuleList([Psi(state_dim, action_dim, FEATURES), TwinRFFCritic(FEATURES)])
    psi, critics = judges.requires_grad_(False)
    state, noise = torch.randn(batch, state_dim), torch.randn(batch, action_dim)
    temperature = torch.tensor(0.1)
    as_written = eager_diffsr.Actor(eager.sequential(policy.trunk), policy.log_std_bounds)
    heads = eager_diffsr.RFFCritic(*(eager.sequential(q.head) for q in (critics.q1, critics.q2)))
    trained = copy.deepcopy(nn.ModuleList([eager.sequential(psi.trunk), heads])).requires_grad_()
    frozen = copy.deepcopy(trained).requires_grad_(False)
    in_bf16, *bf16_judges = copy.deepcopy([policy, psi, critics])
    for network in (in_bf16.trunk, bf16_judges[0].trunk):
        network.compute_dtype = torch.bfloat16
    for q in (bf16_judges[1].q1, bf16_judges[1].q2):
        q.head.compute_dtype = torch.bfloat16
    retrained = copy.deepcopy(policy)

    def by_distribution(
        actor: nn.Module, psi: nn.Module, critics: nn.Module, state: Tensor, z: Tensor
    ) -> Tensor:
        distribution = actor(state)
        normal = distribution.base_dist
        action = distribution.transforms[0](normal.loc + normal.scale * z)
        log_prob = distribution.log_prob(action).sum(-1, keepdim=True)
        q = torch.min(*critics(psi(torch.cat([state, action], dim=-1))))
        return (temperature.to(q.dtype) * log_prob - q).mean()

    def ours(
        actor: nn.Module, psi: nn.Module, critics: nn.Module, state: Tensor, z: Tensor
    ) -> Tensor:
        return ops.soft_value(actor, psi, critics, state, z, temperature)[0]

    def run(loss: Callable[..., Tensor], of: nn.Module, *others: Any) -> Result:
        value = loss(of, *others)
        return value, *torch.autograd.grad(value, list(of.parameters()))

    def trained_judges() -> Result:
        """As the authors have it: the judges' gradients are computed too, and thrown away."""
        value = by_distribution(as_written, *trained, state, torch.randn_like(noise))
        wanted = [*as_written.parameters(), *trained.parameters()]
        return torch.autograd.grad(value, wanted, allow_unused=True)

    scales = scales_of(run(by_distribution, as_written, *frozen, state, noise))

    def variant(
        name: str, loss: Callable[..., Tensor], of: nn.Module, judges: Any, **more: Any
    ) -> Variant:
        return Variant(
            name,
            lambda: run(loss, of, *judges, state, torch.randn_like(noise)),
            lambda: in_scale(run(loss, of, *judges, state, noise), scales),
            **more,
        )

    def in_jax() -> Variant | None:
        if not (jax := rivals.jax_baselines()):
            return None
        networks = [psi.trunk, critics.q1.head, critics.q2.head]
        counts = [len(list(network.parameters())) for network in networks]

        def of_parameters(*arrays: Any) -> Any:
            *parameters, state, noise = arrays
            split = len(parameters) - sum(counts)
            layers, judges = [jax.as_layers(parameters[:split])], parameters[split:]
            for count in counts:
                layers.append(jax.as_layers(judges[:count]))
                judges = judges[count:]
            actor, psi, *heads = layers
            return jax.soft_value(
                actor, psi, heads, state, noise, temperature.item(), policy.log_std_bounds
            )

        judges = [p for network in networks for p in network.parameters()]
        inputs, one = list(policy.parameters()), torch.ones(())
        call = jax.ForwardAndBackward(of_parameters, inputs, one, *judges, state, noise)
        return Variant(JAX, call, lambda: in_scale(call.on(), scales))

    compiled = torch.compile(by_distribution, dynamic=False)
    forget = {"before": lambda: change_weights(retrained)}
    checked = variant(BASELINE, by_distribution, as_written, frozen)
    variants = [
        Variant(BASELINE, trained_judges, checked.given),
        variant(OPTIMISED, by_distribution, as_written, frozen),
        variant(COMPILED, compiled, as_written, frozen),
        in_jax(),
        variant(OURS, ours, policy, (psi, critics)),
        variant(OURS_NEW_WEIGHTS, ours, retrained, (psi, critics), **forget),
        variant(OURS_BF16, ours, in_bf16, bf16_judges),
    ]

    def exact() -> Tensor:
        double = copy.deepcopy([as_written, *frozen])
        inputs = (*(network.double() for network in double), state.double(), noise.double())
        return in_scale(run(by_distribution, *inputs), scales)

    return Case(
        "soft_value",
        state_dim,
        batch,
        1,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(2e-2, 1.0),
    )


def random_noise(batch: int, state_dim: int) -> tuple[Tensor, Tensor]:
    """(offset, score_weight) as in the released code: alpha-bar between 0.391 and 0.967, noise of
    0.449."""
    level = 0.391 + 0.576 * torch.rand(batch)
    offset = -(1 - level).sqrt()[:, None] * 0.449 * torch.randn(batch, state_dim)
    return offset, -(1 - level) * 0.449


def score_matching_loss_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """Diff-SR's loss from psi and zeta's last hidden layer on, with all gradients."""
    torch.manual_seed(SEED)
    state_dim, _ = SIZES[env]
    psi, hidden = torch.randn(batch, FEATURES), torch.randn(batch, ZETA_HIDDEN)
    last = nn.Linear(ZETA_HIDDEN, FEATURES * state_dim)
    inputs = [psi.requires_grad_(), hidden.requires_grad_(), last.weight, last.bias]
    offset, score_weight = random_noise(batch, state_dim)

    def run(loss: Callable[..., Tensor], **options: torch.dtype) -> Result:
        def of_inputs(*inputs: Tensor) -> Tensor:
            dtype = inputs[0].dtype
            return loss(*inputs, offset.to(dtype), score_weight.to(dtype), **options)

        return forward_and_backward(of_inputs, inputs, torch.ones(()))

    scales = scales_of(run(eager_diffsr.score_matching_loss))

    def variant(name: str, loss: Callable[..., Tensor], **options: torch.dtype) -> Variant:
        return Variant(
            name, lambda: run(loss, **options), lambda: in_scale(run(loss, **options), scales)
        )

    jax = rivals.jax_baselines()
    in_jax = jax and jax.ForwardAndBackward(
        jax.score_matching_loss, inputs, torch.ones(()), offset, score_weight
    )
    variants = [
        variant(BASELINE, eager_diffsr.score_matching_loss),
        variant(COMPILED, torch.compile(eager_diffsr.score_matching_loss, dynamic=False)),
        jax and Variant(JAX, in_jax, lambda: in_scale(in_jax.on(), scales)),
        variant(OURS, ops.score_matching_loss),
        variant(OURS_BF16, ops.score_matching_loss, compute_dtype=torch.bfloat16),
    ]

    def exact() -> Tensor:
        double = [i.detach().double().requires_grad_() for i in inputs]

        def loss(*inputs: Tensor) -> Tensor:
            return eager_diffsr.score_matching_loss(*inputs, offset.double(), score_weight.double())

        return in_scale(forward_and_backward(loss, double, torch.ones(())), scales)

    # The products with the last layer's weight, forward and twice backward, and those with psi.
    products = FEATURES * state_dim * (3 * ZETA_HIDDEN + 3)
    return Case(
        "score_matching_loss",
        state_dim,
        batch,
        1,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(1e-2, 1.0),
        flops=2.0 * batch * products,
    )


def representation_loss_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """psi, zeta and their loss, with the gradients of all parameters, at the agent's sizes."""
    torch.manual_seed(SEED)
    state_dim, _ = SIZES[env]
    representation = DiffSR(*SIZES[env], DiffSRConfig.for_env(env), seed=SEED).representation
    networks = nn.ModuleList([representation.psi.trunk, representation.zeta.trunk])
    retrained = copy.deepcopy(networks)
    as_written = nn.ModuleList(eager.sequential(network) for network in networks)
    x, perturbed = (torch.randn(batch, network.in_dim) for network in networks)
    inputs = [x, perturbed, *random_noise(batch, state_dim)]

    def run(
        loss: Callable[..., Tensor],
        networks: nn.ModuleList,
        inputs: Sequence[Tensor] = inputs,
        **options: torch.dtype,
    ) -> Result:
        value = loss(*networks, *inputs, **options)
        return value, *torch.autograd.grad(value, [*networks.parameters()])

    scales = scales_of(run(eager_diffsr.representation_loss, as_written))

    def variant(
        name: str,
        loss: Callable[..., Tensor],
        networks: nn.ModuleList,
        before: Callable[[], object] | None = None,
        **options: torch.dtype,
    ) -> Variant:
        call = functools.partial(run, loss, networks, **options)
        return Variant(name, call, lambda: in_scale(call(), scales), before)

    def in_jax() -> Variant | None:
        if not (jax := rivals.jax_baselines()):
            return None

        def of_parameters(*arrays: Any) -> Any:
            *parameters, x, perturbed, offset, score_weight = arrays
            layers, of_psi = jax.as_layers(parameters), len(networks[0].layers)
            psi, zeta = layers[:of_psi], layers[of_psi:]
            return jax.representation_loss(psi, zeta, x, perturbed, offset, score_weight)

        parameters = list(networks.parameters())
        call = jax.ForwardAndBackward(of_parameters, parameters, torch.ones(()), *inputs)
        return Variant(JAX, call, lambda: in_scale(call.on(), scales))

    variants = [
        variant(BASELINE, eager_diffsr.representation_loss, as_written),
        variant(
            COMPILED,
            torch.compile(eager_diffsr.representation_loss, dynamic=False),
            as_written,
        ),
        in_jax(),
        variant(OURS, ops.representation_loss, networks),
        variant(
            OURS_NEW_WEIGHTS,
            ops.representation_loss,
            retrained,
            before=lambda: change_weights(retrained),
        ),
        variant(OURS_BF16, ops.representation_loss, networks, compute_dtype=torch.bfloat16),
    ]

    def exact() -> Tensor:
        double = copy.deepcopy(as_written).double()
        result = run(eager_diffsr.representation_loss, double, [i.double() for i in inputs])
        return in_scale(result, scales)

    # Every layer forward and back to its weight, and to its input but for the first; then psi's
    # with zeta.
    products = 3 * networks[0].out_dim * state_dim
    for network in networks:
        first, *others = (layer.weight.numel() for layer in network.layers)
        products += 2 * first + 3 * sum(others)
    return Case(
        "representation_loss",
        state_dim,
        batch,
        1,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(1e-2, 1.0),
        flops=2.0 * batch * products,
    )


def diffsr_update_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """One whole update of Diff-SR: four representation steps, critic, actor, temperature, target."""
    torch.manual_seed(SEED)
    sizes = SIZES[env]
    replay = random_replay(*sizes)
    generator = torch.Generator().manual_seed(SEED)
    defaults = DiffSRConfig.for_env(env)
    steps = defaults.extra_feature_steps + 1

    def agent(**fields: Any) -> DiffSR:
        config = dataclasses.replace(defaults, batch_size=batch, **fields)
        return DiffSR(*sizes, config, seed=SEED)

    def agent_to_check(**fields: Any) -> DiffSR:
        return agent(adam_eps=CHECK_EPS, update_target_every=1, **fields)

    batches = [replay.sample(batch, generator) for _ in range(steps)]
    levels = [torch.randint(defaults.noise_steps, (batch,)) for _ in range(steps)]
    noises = [torch.randn(batch, sizes[0]) for _ in range(steps)]
    policy_noise = [torch.randn(batch, sizes[1]) for _ in range(2)]

    def moved(an_agent: Any, dtype: torch.dtype = torch.float32) -> Result:
        """What one update on given batches and draws adds to the parameters."""
        draws = iter([noise.to(dtype) for noise in policy_noise])
        an_agent._policy_noise = lambda _: next(draws)
        parameters = list(parameters_of(an_agent))
        before = [p.detach().clone() for p in parameters]
        for some, level, noise in zip(batches, levels, noises, strict=True):
            an_agent.update_representation(cast(some, dtype), level=level, noise=noise.to(dtype))
        an_agent.update_critic(cast(batches[-1], dtype))
        an_agent.update_actor(cast(batches[-1], dtype))
        an_agent.update_target()
        return [p.detach() - b for p, b in zip(parameters, before, strict=True)]

    scales: list[float] = []

    def as_one(result: Result) -> Tensor:
        if not scales:
            scales.extend(scales_of(moved(eager_diffsr.EagerDiffSR(agent_to_check()))))
        return in_scale(result, scales)

    def in_eager(name: str, form: Callable[[DiffSR], eager_diffsr.EagerDiffSR]) -> Variant:
        eager_agent = form(agent())
        return Variant(
            name,
            lambda: eager_agent.update(replay, generator),
            lambda: as_one(moved(form(agent_to_check()))),
        )

    def ours(name: str, **fields: Any) -> Variant:
        our_agent = agent(**fields)
        return Variant(
            name,
            lambda: our_agent.update(replay),
            lambda: as_one(moved(agent_to_check(**fields))),
        )

    def in_jax() -> Variant | None:
        if not (jax := rivals.jax_baselines()):
            return None
        module = importlib.import_module("jax_diffsr")
        jax_agent, start = module.JaxDiffSR(agent()), module.JaxDiffSR(agent_to_check())
        arrays = jax.replay_arrays(replay)
        given = (batches, levels, noises, policy_noise)
        return Variant(
            JAX,
            lambda: jax_agent.update(arrays),
            lambda: as_one(start.moved(*given)),
        )

    def exact() -> Tensor:
        double = agent_to_check()
        for part in (double.representation, double.critic, double.actor, double.temperature):
            part.double()
        return as_one(moved(eager_diffsr.EagerDiffSR(double), torch.float64))

    variants = [
        in_eager(BASELINE, eager_diffsr.EagerDiffSR),
        in_eager(OPTIMISED, eager_diffsr.OptimisedDiffSR),
        in_eager(COMPILED, functools.partial(eager_diffsr.OptimisedDiffSR, compiled=True)),
        in_jax(),
        ours(OURS),
        ours(OURS_BF16, compute_dtype="bfloat16"),
    ]
    return Case(
        "diffsr_update",
        sizes[0],
        batch,
        steps,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(1e-2, 10.0),
    )


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    floats = {name: v.to(dtype) for name, v in vars(batch).items() if name != "index"}
    return dataclasses.replace(batch, **floats)


def parameters_of(agent: DiffSR | eager_diffsr.EagerDiffSR) -> Iterator[Tensor]:
    """All that an update changes, in the same order for both agents."""
    if isinstance(agent, DiffSR):
        modules = [agent.representation.psi, agent.representation.zeta, agent.critic, agent.actor]
        temperature = agent.temperature.log
    else:
        modules = [agent.psi, agent.zeta, agent.critic, agent.actor]
        temperature = agent.log_alpha
    for module in (*modules, agent.critic_target):
        yield from module.parameters()
    yield temperature
