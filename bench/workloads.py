"""What is compared: for each op and size the variants, a check of their results, and their cost."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import eager
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffcore import DiffusionSchedule, ops
from diffcore.agents import DIPO, DIPOConfig
from diffcore.nn import Denoiser, TwinCritic
from diffcore.ops import _dispatch
from diffcore.training import ReplayBuffer

BASELINE = "eager, as written"
OPTIMISED = "eager, hand-optimised"
OPTIMISED_BF16 = "eager, hand-optimised, bf16"
COMPILED = "torch.compile"
JAX = "JAX"
OURS = "diffcore"
OURS_NEW_WEIGHTS = "diffcore, new weights"
OURS_BF16 = "diffcore, bf16"
VARIANTS = (
    BASELINE, OPTIMISED, OPTIMISED_BF16, COMPILED, JAX, OURS, OURS_NEW_WEIGHTS, OURS_BF16
)  # fmt: skip

#: observation and action sizes of some environments
SIZES = {
    "Pendulum-v1": (3, 1),
    "Hopper-v5": (11, 3),
    "HalfCheetah-v5": (17, 6),
    "Humanoid-v5": (348, 17),
    "Humanoid-v4": (376, 17),
}
ACTION_GRADIENT_STEPS = 20
SEED = 0


#: Allowed in a single action. Rounding alone comes far below, but where two critics' values all but
#: tie a row may rightly take either's gradient, and Adam makes a full step of a tiny one.
LARGEST_ERROR = 0.05


class Rivals(NamedTuple):
    """Which of the competitors that take long to compile, or may be missing, take part."""

    compiled: bool = True
    jax: bool = importlib.util.find_spec("jax") is not None

    def jax_baselines(self) -> Any:
        """The module, None if JAX doesn't take part."""
        return importlib.import_module("jax_baselines") if self.jax else None

    def admit(self, variants: Iterable[Variant | None]) -> tuple[Variant, ...]:
        """The variants that take part; None stands for one that couldn't be made."""
        return tuple(v for v in variants if v and (self.compiled or v.name != COMPILED))


Result = Sequence[Tensor]
"""What an op returns, then its gradients."""

ALL_RIVALS = Rivals()
NO_RIVALS = Rivals(compiled=False, jax=False)


class WrongResultError(Exception):
    """A variant that is to be timed doesn't compute what it should."""


class Error(NamedTuple):
    """Absolute difference of actions from what float64 gives."""

    median: float
    largest: float


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case."""

    name: str
    call: Callable[[], object]
    """The timed call. Draws its own noise."""
    given: Callable[[], Tensor] | None = None
    """The same work on given noise, to be checked."""
    before: Callable[[], object] | None = None
    """Runs before every timed call, untimed."""


@dataclass(frozen=True)
class Case:
    """An op at one size."""

    op: str
    state_dim: int
    batch: int
    steps: int
    variants: tuple[Variant, ...]
    exact: Callable[[], Tensor] | None = None
    """The result in float64, for every variant's ``given``."""
    bfloat16_bound: Error | None = None
    """The error allowed in bf16."""
    flops: float | None = None
    """Operations of a call, in matrix products alone."""
    _errors: dict[str, Error] = field(default_factory=dict)

    @property
    def cores(self) -> int:
        """Cores that diffcore uses here: it wakes no second thread for less than 8 rows."""
        return torch.get_num_threads() if self.batch >= 8 else 1

    def __str__(self) -> str:
        return f"{self.op}, state {self.state_dim}, batch {self.batch}, {self.steps} steps"

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)

    @functools.cached_property
    def _exact(self) -> Tensor:
        assert self.exact is not None
        return self.exact()

    def error(self, name: str) -> Error:
        """The error of a variant's ``given`` against float64."""
        if name not in self._errors:
            given = self.variant(name).given
            assert given is not None
            difference = (given().double() - self._exact).abs()
            self._errors[name] = Error(difference.median().item(), difference.max().item())
        return self._errors[name]

    def check(self, name: str) -> Error | None:
        """The variant's error, None if it has no ``given``.

        Raises:
            WrongResultError: the median error is larger than twice that of eager PyTorch in
                float32 (in bf16: than the case's bound), or the largest is no rounding error.
        """
        if self.variant(name).given is None:
            return None
        error = self.error(name)
        bound = Error(2 * self.error(BASELINE).median + 2e-7, LARGEST_ERROR)
        if name in (OPTIMISED_BF16, OURS_BF16):
            assert self.bfloat16_bound is not None
            bound = self.bfloat16_bound
        if not (error.median <= bound.median and error.largest <= bound.largest):
            raise WrongResultError(
                f"{self}: {name!r} has the error {error}, allowed is {bound}"
            )
        return error

    def check_kernels(self) -> None:
        """Ask it once all variants were timed: one may change what another one works on.

        Raises:
            WrongResultError: a call of ours, or a part of one, runs on the reference.
        """
        for variant in self.variants:
            if variant.name in (OURS, OURS_NEW_WEIGHTS, OURS_BF16):
                choose = functools.partial(_kernel, f"{self}: {variant.name!r}", _dispatch.choose)
                with mock.patch.object(_dispatch, "choose", choose):
                    variant.call()


def _kernel(what: str, choose: Callable[..., str], op: str, *settings: Any) -> str:
    chosen = choose(op, *settings)
    if chosen == "reference":
        raise WrongResultError(f"{what} runs {op} on the reference")
    return chosen


def reverse_diffusion_case(env: str, batch: int, steps: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """The whole chain of a diffusion policy, noise drawn inside the call."""
    torch.manual_seed(SEED)
    state_dim, action_dim = SIZES[env]
    denoiser = Denoiser(state_dim, action_dim)
    schedule = DiffusionSchedule.cosine(steps)
    state = torch.randn(batch, state_dim)

    # What eager code as written draws from torch's generator after this seed.
    torch.manual_seed(SEED)
    x_init = torch.randn(batch, action_dim)
    noise = torch.stack([torch.randn_like(x_init) for _ in range(steps)])

    as_written = eager.GaussianDiffusion(denoiser, schedule)
    optimised = eager.OptimisedSampler(denoiser, schedule)
    bf16 = eager.OptimisedSampler(denoiser, schedule, torch.bfloat16)
    compiled_sampler = eager.CompiledSampler(denoiser, schedule)
    retrained = copy.deepcopy(denoiser)
    bfloat16 = {"compute_dtype": torch.bfloat16}

    def as_written_given() -> Tensor:
        torch.manual_seed(SEED)
        return as_written.sample(state)

    @torch.no_grad()
    def ours(model: Denoiser = denoiser, **options) -> Tensor:
        return ops.reverse_diffusion(model, schedule, state, **options)

    def exact() -> Tensor:
        with torch.no_grad():
            return ops.reverse_diffusion(
                copy.deepcopy(denoiser).double(),
                schedule,
                state.double(),
                x_init=x_init.double(),
                noise=noise.double(),
                backend="reference",
            )

    given = {"x_init": x_init, "noise": noise}
    if jax := rivals.jax_baselines():
        jax_sampler = jax.Sampler(denoiser, schedule, state)
    variants = [
        Variant(BASELINE, lambda: as_written.sample(state), as_written_given),
        Variant(OPTIMISED, lambda: optimised(state), lambda: optimised(state, **given)),
        Variant(OPTIMISED_BF16, lambda: bf16(state), lambda: bf16(state, **given)),
        Variant(
            COMPILED,
            lambda: compiled_sampler(state),
            lambda: compiled_sampler(state, **given),
        ),
        jax and Variant(JAX, jax_sampler, lambda: jax_sampler.on(**given)),
        Variant(OURS, ours, lambda: ours(**given)),
        Variant(
            OURS_NEW_WEIGHTS,
            lambda: ours(retrained),
            lambda: ours(retrained, **given),
            before=functools.partial(change_weights, retrained),
        ),
        Variant(OURS_BF16, lambda: ours(**bfloat16), lambda: ours(**given, **bfloat16)),
    ]
    # The products with x and the hidden activations; what a chain computes once isn't counted.
    hidden = denoiser.trunk.hidden_dim
    per_row = 2 * hidden * action_dim + (denoiser.trunk.hidden_layers - 1) * hidden**2
    return Case(
        "reverse_diffusion",
        state_dim,
        batch,
        steps,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(1e-3, 1e-2),
        flops=2.0 * batch * steps * per_row,
    )


def action_gradient_case(
    env: str, batch: int, steps: int = ACTION_GRADIENT_STEPS, *, rivals: Rivals = ALL_RIVALS
) -> Case:
    """All steps of the ascent of a batch of actions on min(Q1, Q2)."""
    torch.manual_seed(SEED)
    state_dim, action_dim = SIZES[env]
    critic = TwinCritic(state_dim, action_dim)
    retrained = copy.deepcopy(critic)
    state, action = torch.randn(batch, state_dim), torch.rand(batch, action_dim) * 2 - 1
    options = {"steps": steps, "max_norm": 0.1 * action_dim}

    critic_as_written = eager.Critic(critic)
    optimised = eager.OptimisedActionGradient(critic, **options)
    compiled_ascent = eager.CompiledActionGradient(critic, **options)

    def as_written() -> Tensor:
        return eager.action_gradient(critic_as_written, state, action, **options)

    def ours(model: TwinCritic = critic, **more) -> Tensor:
        return ops.action_gradient(model, state, action, **options, **more)

    def exact() -> Tensor:
        return ops.action_gradient(
            copy.deepcopy(critic).double(),
            state.double(),
            action.double(),
            backend="reference",
            **options,
        )

    def same(name: str, call: Callable[[], Tensor], **more) -> Variant:
        return Variant(name, call, call, **more)  # nothing is drawn here

    if jax := rivals.jax_baselines():
        jax_ascent = jax.ActionGradient(critic, state, action, **options)
    variants = [
        same(BASELINE, as_written),
        same(OPTIMISED, lambda: optimised(state, action)),
        same(COMPILED, lambda: compiled_ascent(state, action)),
        jax and Variant(JAX, jax_ascent, jax_ascent.on),
        same(OURS, ours),
        same(
            OURS_NEW_WEIGHTS,
            lambda: ours(retrained),
            before=functools.partial(change_weights, retrained),
        ),
        same(OURS_BF16, lambda: ours(compute_dtype=torch.bfloat16)),
    ]
    # Both critics forward, one of them back to the action.
    hidden, inner = critic.q1.hidden_dim, critic.q1.hidden_layers - 1
    forward = action_dim * hidden + inner * hidden**2 + hidden
    backward = inner * hidden**2 + hidden * action_dim
    return Case(
        "action_gradient",
        state_dim,
        batch,
        steps,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(1e-2, 0.5),
        flops=2.0 * batch * steps * (2 * forward + backward),
    )


def reverse_step_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """One step of the chain from a predicted noise; the step's noise is drawn in the call."""
    torch.manual_seed(SEED)
    steps = 100
    state_dim, action_dim = SIZES[env]
    schedule = DiffusionSchedule.cosine(steps)
    middle = steps // 2
    coefficients = schedule.solver("ddpm").coefficients[middle].float()
    x, eps, z = torch.randn(3, batch, action_dim)
    level = torch.full((batch,), int(schedule.solver("ddpm").timesteps[middle]))
    diffusion = eager.GaussianDiffusion(Denoiser(state_dim, action_dim, 8), schedule)
    c = coefficients.tolist()

    def as_written(noise: Tensor | None = None) -> Tensor:
        return diffusion.step(x, level, eps, torch.randn_like(x) if noise is None else noise)

    def optimised(x: Tensor, eps: Tensor, z: Tensor) -> Tensor:
        return c[2] * (c[0] * x - c[1] * eps).clamp(-1.0, 1.0) + c[3] * x + c[5] * z

    def ours(noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x) if noise is None else noise
        return ops.reverse_step(x, eps, coefficients, noise=noise)[0]

    compiled = torch.compile(optimised, dynamic=False)
    jax = rivals.jax_baselines()
    in_jax = jax and jax.ReverseStep(c, x, eps)
    variants = [
        Variant(BASELINE, as_written, lambda: as_written(z)),
        Variant(
            OPTIMISED, lambda: optimised(x, eps, torch.randn_like(x)), lambda: optimised(x, eps, z)
        ),
        Variant(
            COMPILED, lambda: compiled(x, eps, torch.randn_like(x)), lambda: compiled(x, eps, z)
        ),
        jax and Variant(JAX, in_jax, lambda: in_jax.on(z)),
        Variant(OURS, ours, lambda: ours(z)),
    ]

    def exact() -> Tensor:
        table = schedule.solver("ddpm").coefficients[middle]
        tensors = (t.double() for t in (x, eps))
        return ops.reverse_step(*tensors, table, noise=z.double())[0]

    return Case("reverse_step", state_dim, batch, 1, rivals.admit(variants), exact)


def mlp_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """Forward and backward of one critic, gradients of its parameters and input included."""
    torch.manual_seed(SEED)
    model = TwinCritic(*SIZES[env]).q1
    retrained = copy.deepcopy(model)
    as_written = eager.sequential(copy.deepcopy(model))
    x = torch.randn(batch, model.in_dim, requires_grad=True)
    compiled_model = torch.compile(eager.sequential(copy.deepcopy(model)), dynamic=False)

    in_bf16 = copy.deepcopy(model)
    in_bf16.compute_dtype = torch.bfloat16

    grad = torch.ones(batch, 1)

    def call_of(run: Callable[[Tensor], Tensor], of: nn.Module, x: Tensor) -> Callable[[], Result]:
        inputs = [x, *of.parameters()]
        return lambda: forward_and_backward(lambda x, *_: run(x), inputs, grad)

    def gradients(result: Result) -> Tensor:
        return flat(result[1:])

    def exact() -> Tensor:
        double = copy.deepcopy(as_written).double()
        return gradients(call_of(double, double, x.detach().double().requires_grad_())())

    def same(name: str, run: Callable[[Tensor], Tensor], of: nn.Module, **more: Any) -> Variant:
        call = call_of(run, of, x)
        return Variant(name, call, lambda: gradients(call()), **more)

    def in_jax() -> Variant | None:
        if not (jax := rivals.jax_baselines()):
            return None

        def of_parameters(x: Any, *parameters: Any) -> Any:
            return jax.mlp(x, jax.as_layers(parameters))

        call = jax.ForwardAndBackward(of_parameters, [x, *model.parameters()], grad)
        return Variant(JAX, call, lambda: gradients(call.on()))

    variants = [
        same(BASELINE, as_written, as_written),
        same(COMPILED, compiled_model, compiled_model),
        in_jax(),
        same(OURS, model, model),
        same(
            OURS_NEW_WEIGHTS,
            retrained,
            retrained,
            before=functools.partial(change_weights, retrained),
        ),
        same(OURS_BF16, in_bf16, in_bf16),
    ]
    products = model.in_dim * model.hidden_dim + model.hidden_dim
    products += (model.hidden_layers - 1) * model.hidden_dim**2
    return Case(
        "mlp",
        SIZES[env][0],
        batch,
        1,
        rivals.admit(variants),
        exact,
        bfloat16_bound=Error(2e-5 * batch**0.5, 1e-2 * batch**0.5),
        flops=2.0 * 3 * batch * products,
    )


#: Allowed in bf16 in what a fresh Adam's step moves, in learning rates: it goes by a gradient's sign,
#: which a tiny gradient may have either way.
MOVED_IN_BFLOAT16 = Error(2e-3, 2.0)


class Update:
    """One optimiser step after another on a loss, the first with fresh moments."""

    lr, eps = 3e-4, 1e-5

    def __init__(self, module: nn.Module, loss: Callable[[], Tensor], *, fused: bool) -> None:
        self.module, self.loss = module, loss
        self.optimizer = torch.optim.Adam(
            module.parameters(), lr=self.lr, eps=self.eps, fused=fused
        )

    def __call__(self) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def moved(self) -> Tensor:
        """By how many learning rates the next step moves every parameter, 1 where the gradient
        isn't tiny."""
        before = flat(self.module.parameters())
        self()
        return (flat(self.module.parameters()) - before) / self.lr


def forward_and_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Result:
    """The function's value and its gradients at all inputs."""
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """A detached copy of all of them, as one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def critic_update_case(env: str, batch: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """Forward, backward and Adam of a twin critic on given targets."""
    torch.manual_seed(SEED)
    state_dim, action_dim = SIZES[env]
    start = TwinCritic(state_dim, action_dim)
    state, action = torch.randn(batch, state_dim), torch.rand(batch, action_dim) * 2 - 1
    target = torch.randn(batch, 1)

    def update(
        form: Callable[[TwinCritic], Any], *, fused: bool, dtype: torch.dtype = torch.float32
    ) -> Update:
        critic = form(copy.deepcopy(start)).to(dtype)
        s, a, y = (x.to(dtype) for x in (state, action, target))

        def loss() -> Tensor:
            if isinstance(critic, TwinCritic):
                return critic.loss(s, a, y)[0]
            q1, q2 = critic(s, a)
            return mse_loss(q1, y) + mse_loss(q2, y)

        return Update(critic, loss, fused=fused)

    def variant(name: str, form: Callable[[TwinCritic], Any], *, fused: bool = True) -> Variant:
        return Variant(
            name, update(form, fused=fused), lambda: update(form, fused=fused).moved()
        )

    def compiled(critic: TwinCritic) -> Any:
        return torch.compile(eager.Critic(critic), dynamic=False)

    def in_bf16(critic: TwinCritic) -> TwinCritic:
        critic.q1.compute_dtype = critic.q2.compute_dtype = torch.bfloat16
        return critic

    jax = rivals.jax_baselines()
    in_jax = jax and jax.critic_update(start, state, action, target, Update.lr, Update.eps)
    variants = [
        variant(BASELINE, eager.Critic, fused=False),
        variant(OPTIMISED, eager.Critic),
        variant(COMPILED, compiled),
        jax and Variant(JAX, in_jax, in_jax.moved),
        variant(OURS, lambda critic: critic),
        variant(OURS_BF16, in_bf16),
    ]
    return Case(
        "critic_update",
        state_dim,
        batch,
        1,
        rivals.admit(variants),
        lambda: update(eager.Critic, fused=False, dtype=torch.float64).moved(),
        bfloat16_bound=MOVED_IN_BFLOAT16,
    )


def denoising_update_case(
    env: str, batch: int, steps: int, *, rivals: Rivals = ALL_RIVALS
) -> Case:
    """Forward, backward and Adam of the denoising loss; levels and noise drawn in the call."""
    torch.manual_seed(SEED)
    state_dim, action_dim = SIZES[env]
    start = Denoiser(state_dim, action_dim)
    schedule = DiffusionSchedule.cosine(steps)
    state, action = torch.randn(batch, state_dim), torch.rand(batch, action_dim) * 2 - 1
    t, noise = torch.randint(steps, (batch,)), torch.randn(batch, action_dim)
    given = {"t": t, "noise": noise}
    bfloat16: Any = {"compute_dtype": torch.bfloat16}

    def as_written(*, fused: bool, **fixed: Tensor) -> Update:
        diffusion = eager.GaussianDiffusion(copy.deepcopy(start), schedule)
        return Update(diffusion, lambda: diffusion.loss(state, action, **fixed), fused=fused)

    def compiled(**fixed: Tensor) -> Update:
        diffusion = eager.GaussianDiffusion(copy.deepcopy(start), schedule)
        diffusion.model = torch.compile(diffusion.model, dynamic=False)
        return Update(diffusion, lambda: diffusion.loss(state, action, **fixed), fused=True)

    def ours(
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        **fixed: Tensor,
    ) -> Update:
        denoiser = copy.deepcopy(start).to(dtype)
        s, a = state.to(dtype), action.to(dtype)

        def loss() -> Tensor:
            settings = {**fixed, "compute_dtype": compute_dtype}
            return ops.denoising_loss(denoiser, schedule, s, a, **settings)

        return Update(denoiser, loss, fused=True)

    jax = rivals.jax_baselines()
    in_jax = jax and jax.denoising_update(
        start, schedule, state, action, t, noise, Update.lr, Update.eps
    )
    variants = [
        Variant(BASELINE, as_written(fused=False), as_written(fused=False, **given).moved),
        Variant(OPTIMISED, as_written(fused=True), as_written(fused=True, **given).moved),
        Variant(COMPILED, compiled(), compiled(**given).moved),
        jax and Variant(JAX, in_jax, in_jax.moved),
        Variant(OURS, ours(), ours(**given).moved),
        Variant(OURS_BF16, ours(**bfloat16), ours(**bfloat16, **given).moved),
    ]
    return Case(
        "denoising_update",
        state_dim,
        batch,
        steps,
        rivals.admit(variants),
        lambda: ours(dtype=torch.float64, t=t, noise=noise.double()).moved(),
        bfloat16_bound=MOVED_IN_BFLOAT16,
    )


def dipo_step_case(env: str, steps: int, *, rivals: Rivals = ALL_RIVALS) -> Case:
    """What one environment step costs DIPO: an action, and an update on a batch of 256."""
    state_dim, action_dim = SIZES[env]
    replay = random_replay(state_dim, action_dim)
    observation = torch.randn(1, state_dim)

    def agent(compute_dtype: str) -> DIPO:
        fields = {**vars(DIPOConfig.for_env(env)), "diffusion_steps": steps}
        config = DIPOConfig(**{**fields, "compute_dtype": compute_dtype})
        return DIPO(state_dim, action_dim, config, seed=SEED)

    def in_eager(name: str, form: Callable[[DIPO], eager.EagerDIPO]) -> Variant:
        eager_agent = form(agent("float32"))
        generator = torch.Generator().manual_seed(SEED)

        def step() -> None:
            eager_agent.act(observation)
            eager_agent.update(replay, generator)

        return Variant(name, step, lambda: given_update(form(agent("float32"))))

    def in_jax() -> Variant | None:
        if not (jax := rivals.jax_baselines()):
            return None
        jax_agent, start = (jax.JaxDIPO(agent("float32")) for _ in range(2))
        arrays, jax_observation = jax.replay_arrays(replay), jax.to_jax(observation)

        def step() -> None:
            nonlocal arrays
            jax_agent.act(jax_observation)
            arrays = jax_agent.update(arrays)

        given = (batch, next_action, t, noise)
        return Variant(JAX, step, lambda: start.moved(*given))

    def ours(name: str, compute_dtype: str) -> Variant:
        our_agent = agent(compute_dtype)

        def step() -> None:
            our_agent.act(observation, explore=True)
            our_agent.update(replay)

        return Variant(name, step, lambda: given_update(agent(compute_dtype)))

    # One update on one batch with the random parts given. The result: by how many learning rates
    # every parameter has moved, about 1 where the gradient isn't tiny.
    rows = DIPOConfig.for_env(env).batch_size
    batch = replay.sample(rows, torch.Generator().manual_seed(SEED))
    next_action, noise = torch.rand(rows, action_dim) * 2 - 1, torch.randn(rows, action_dim)
    t = torch.randint(steps, (rows,))

    def given_update(an_agent: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        floats = {n: v.to(dtype) for n, v in vars(batch).items() if n != "index"}
        cast = replace(batch, **floats)
        networks = (an_agent.critic, an_agent.critic_target, an_agent.actor, an_agent.actor_target)
        parameters = [p for n in networks for p in n.parameters()]
        before = flat(parameters)
        an_agent.update_critic(cast, next_action.to(dtype))
        improved = an_agent.improve_actions(cast)
        an_agent.update_actor(an_agent.actor.loss(cast.state, improved, t=t, noise=noise.to(dtype)))
        an_agent.update_targets()
        return (flat(parameters) - before) / an_agent.config.lr

    def exact() -> Tensor:
        double = eager.EagerDIPO(agent("float32"))
        for network in (double.critic, double.critic_target, double.actor, double.actor_target):
            network.double()
        torch.set_default_dtype(torch.float64)  # the time embedding's
        try:
            return given_update(double, torch.float64)
        finally:
            torch.set_default_dtype(torch.float32)

    return Case(
        "dipo_step",
        state_dim,
        rows,
        steps,
        rivals.admit(
            [
                in_eager(BASELINE, eager.EagerDIPO),
                in_eager(OPTIMISED, eager.OptimisedDIPO),
                in_eager(COMPILED, functools.partial(eager.OptimisedDIPO, compiled=True)),
                in_jax(),
                ours(OURS, "float32"),
                ours(OURS_BF16, "bfloat16"),
            ]
        ),
        exact,
        bfloat16_bound=Error(1e-4, 2.0),
    )


def random_replay(observation_dim: int, action_dim: int, size: int = 10_000) -> ReplayBuffer:
    """A full replay buffer of random transitions."""
    replay = ReplayBuffer(size, observation_dim, action_dim, bootstrap_truncated=True)
    replay.add(
        torch.randn(size, observation_dim),
        torch.rand(size, action_dim) * 2 - 1,
        torch.randn(size),
        torch.randn(size, observation_dim),
        torch.zeros(size),
        torch.zeros(size),
    )
    return replay


@torch.no_grad()
def change_weights(model: nn.Module) -> None:
    """Change every parameter in place a little, as an optimiser step would."""
    for parameter in model.parameters():
        parameter.flatten()[0] += 1e-6
