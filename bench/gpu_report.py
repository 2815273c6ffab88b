"""Times every op on a GPU: ``python bench/gpu_report.py``; bench/gpu.sh runs it after the tests.

Every variant of a case is checked against float64 before it is timed. Then all are timed in turns by
CUDA events: eager PyTorch, the same in a captured CUDA graph and under torch.compile, and diffcore's
kernels as they are called and captured. The share of the roofline is of what the same run measured:
products of large matrices in each precision, and a copy of memory that no cache holds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import eager
import torch
from torch import Tensor

import diffcore
from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _native

ROOT = Path(__file__).parent.parent
STATE, ACTION, CHAIN, ASCENT = 17, 6, 100, 20  # HalfCheetah, as DIPO trains it
SEED = 0
ROUNDS = 15
LEAST_SECONDS = 0.01
"""How long a variant runs between two events, at least."""

EAGER, GRAPH, COMPILED = "eager", "eager, CUDA graph", "torch.compile"


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case."""

    name: str
    call: Callable[[], Any]
    given: Callable[[], Tensor]
    """The same on given noise, to be checked."""
    bound: float | None = None
    """Of the median error against float64; None: twice eager's."""
    precision: str = "float32"


@dataclass(frozen=True)
class Case:
    """An op at one size."""

    op: str
    batch: int
    exact: Callable[[], Tensor]
    """The result in float64."""
    flops: float
    """Operations in matrix products."""
    bytes: float
    """What has to come from memory and go there, once."""
    variants: list[Variant] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.op}, batch {self.batch}"


class WrongResultError(Exception):
    """A variant doesn't compute what it should."""


# -- the cases -------------------------------------------------------------------------------------


def backends(op: str, *arguments: Any, **options: Any) -> list[str]:
    """The GPU backends that can run a call."""
    passed_over = diffcore.explain(op, *arguments, **options, backend="reference").passed_over
    return [b for b in ("cuda", "triton") if b not in passed_over and knows(op, b)]


def knows(op: str, backend: str) -> bool:
    return backend in getattr(sys.modules[f"diffcore.ops.{op}"], "KERNELS", ())


def multiplies_bfloat16(backend: str, device: str) -> bool:
    """Whether it does: Triton's interpreter takes the bits for integers."""
    return backend != "triton" or device != "cpu"


def reverse_diffusion_case(
    batch: int, steps: int, hidden: int, device: str, compiled: bool
) -> Case:
    """The whole chain of a diffusion policy, noise drawn inside the timed call."""
    torch.manual_seed(SEED)
    denoiser = nn.Denoiser(STATE, ACTION, hidden).to(device).requires_grad_(False)
    schedule = DiffusionSchedule.cosine(steps)
    state = torch.randn(batch, STATE, device=device)
    x = torch.randn(batch, ACTION, device=device)
    noise = torch.randn(steps, batch, ACTION, device=device)

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn_like(x), torch.randn_like(noise)

    def sampler(kind: type[eager.OptimisedSampler]) -> Callable[..., Tensor]:
        result = kind(denoiser, schedule)
        result.embedding = result.embedding.to(device)
        if isinstance(result, eager.CompiledSampler):
            result.blocks = tuple(block.to(device) for block in result.blocks)
        return result

    def ours(backend: str, dtype: torch.dtype | None, **given: Tensor) -> Tensor:
        return ops.reverse_diffusion(
            denoiser, schedule, state, backend=backend, compute_dtype=dtype, **given
        )

    def exact() -> Tensor:
        double = copy.deepcopy(denoiser).double()
        given = {"x_init": x.double(), "noise": noise.double()}
        return ops.reverse_diffusion(double, schedule, state.double(), backend="reference", **given)

    inner = denoiser.trunk.hidden_layers - 1
    products = hidden * ACTION * 2 + inner * hidden**2
    parameters = sum(p.numel() for p in denoiser.parameters())
    case = Case(
        "reverse_diffusion",
        batch,
        exact,
        2.0 * batch * steps * products,
        4.0 * (parameters + batch * (STATE + ACTION)),
    )
    optimised = sampler(eager.OptimisedSampler)
    case.variants.append(
        Variant(EAGER, lambda: optimised(state, *draw()), lambda: optimised(state, x, noise))
    )
    if compiled:
        fused = sampler(eager.CompiledSampler)
        case.variants.append(
            Variant(COMPILED, lambda: fused(state, *draw()), lambda: fused(state, x, noise))
        )
    for backend in backends("reverse_diffusion", denoiser, schedule, state):
        for dtype, bound in ((None, None), (torch.bfloat16, 2e-3)):
            if dtype and not multiplies_bfloat16(backend, device):
                continue
            name = backend if dtype is None else f"{backend}, bf16"
            case.variants.append(
                Variant(
                    name,
                    lambda b=backend, d=dtype: ours(b, d),
                    lambda b=backend, d=dtype: ours(b, d, x_init=x, noise=noise),
                    bound,
                    "float32" if dtype is None else "bfloat16",
                )
            )
    return case


def action_gradient_case(batch: int, steps: int, hidden: int, device: str, compiled: bool) -> Case:
    """All steps of the ascent of a batch of actions on min(Q1, Q2)."""
    torch.manual_seed(SEED)
    critic = nn.TwinCritic(STATE, ACTION, hidden).to(device).requires_grad_(False)
    state = torch.randn(batch, STATE, device=device)
    action = torch.rand(batch, ACTION, device=device) * 2 - 1
    options = {"steps": steps, "max_norm": 0.1 * ACTION}

    def ours(backend: str, dtype: torch.dtype | None) -> Tensor:
        return ops.action_gradient(
            critic, state, action, backend=backend, compute_dtype=dtype, **options
        )

    def exact() -> Tensor:
        double = copy.deepcopy(critic).double()
        return ops.action_gradient(
            double, state.double(), action.double(), backend="reference", **options
        )

    inner = critic.q1.hidden_layers - 1
    one_way = ACTION * hidden + inner * hidden**2 + hidden
    parameters = sum(p.numel() for p in critic.parameters())
    case = Case(
        "action_gradient",
        batch,
        exact,
        2.0 * batch * steps * 3 * one_way,  # both critics forward, one of them back
        4.0 * (parameters + batch * (STATE + 2 * ACTION)),
    )

    def same(name: str, call: Callable[[], Tensor], *rest: Any) -> Variant:
        return Variant(name, call, call, *rest)  # nothing is drawn here

    optimised = eager.OptimisedActionGradient(critic, **options)
    case.variants.append(same(EAGER, lambda: optimised(state, action)))
    if compiled:
        fused = eager.CompiledActionGradient(critic, **options)
        case.variants.append(same(COMPILED, lambda: fused(state, action)))
    for backend in backends("action_gradient", critic, state, action):
        case.variants.append(same(backend, lambda b=backend: ours(b, None)))
        if not multiplies_bfloat16(backend, device):
            continue
        case.variants.append(
            same(
                f"{backend}, bf16",
                lambda b=backend: ours(b, torch.bfloat16),
                1e-2,
                "bfloat16",
            )
        )
    return case


def with_gradients(
    op: str,
    batch: int,
    inputs: list[Tensor],
    function: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    available: list[str],
    flops: float,
    compiled: bool,
) -> Case:
    """A function's value and its gradients at all inputs, in one flat tensor of relative sizes."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.manual_seed(SEED)
    grad = torch.randn_like(function(*leaves))

    def run(f: Callable[..., Tensor], at: list[Tensor]) -> list[Tensor]:
        y = f(*at)
        return [y, *torch.autograd.grad(y, at, grad.to(y.dtype))]

    scales = [r.detach().square().mean().sqrt().item() for r in run(function, leaves)]

    def flat(results: list[Tensor]) -> Tensor:
        pieces = [r.detach().flatten() / s for r, s in zip(results, scales, strict=True)]
        return torch.cat(pieces)

    def variant(name: str, f: Callable[..., Tensor]) -> Variant:
        return Variant(name, lambda: run(f, leaves), lambda: flat(run(f, leaves)))

    doubles = [t.detach().double().requires_grad_() for t in inputs]
    moved = 4.0 * (2 * sum(t.numel() for t in inputs) + 2 * grad.numel())
    case = Case(op, batch, lambda: flat(run(function, doubles)), flops, moved)
    case.variants.append(variant(EAGER, function))
    if compiled:
        case.variants.append(variant(COMPILED, torch.compile(function, dynamic=False)))
    for backend in available:
        case.variants.append(variant(backend, lambda *at, b=backend: ours(*at, backend=b)))
    return case


def elementwise_case(op: str, batch: int, device: str, compiled: bool) -> Case:
    """One step of a sampler, or the forward corruption: limited by memory, or by the launch."""
    torch.manual_seed(SEED)
    schedule = DiffusionSchedule.cosine(CHAIN)
    x, z = torch.randn(2, batch, ACTION, device=device)
    c = schedule.solver("ddpm").coefficients[50].float().to(device)
    t = torch.randint(0, CHAIN, (batch,), device=device)
    abar = schedule.alphas_cumprod.to(device)[t][:, None]

    def step(x: Tensor, eps: Tensor) -> Tensor:
        k = c.to(x.dtype)
        x0 = (k[0] * x - k[1] * eps).clamp(-1, 1)
        return k[2] * x0 + k[3] * x + k[4] * eps

    def corruption(x: Tensor, z: Tensor) -> Tensor:
        return abar.sqrt().to(x.dtype) * x + (1 - abar).sqrt().to(x.dtype) * z

    function = step if op == "reverse_step" else corruption

    def ours(backend: str) -> Tensor:
        if op == "reverse_step":
            return ops.reverse_step(x, z, c, backend=backend)[0]
        return ops.q_sample(x, t, z, schedule, backend=backend)

    numbers = 4 if op == "reverse_step" else 3
    exact = partial(function, x.double(), z.double())
    case = Case(op, batch, exact, 0.0, 4.0 * numbers * x.numel())
    calls = {EAGER: partial(function, x, z)}
    if compiled:
        calls[COMPILED] = partial(torch.compile(function, dynamic=False), x, z)
    arguments = (x, z, c) if op == "reverse_step" else (x, t, z, schedule)
    for backend in backends(op, *arguments):
        calls[backend] = partial(ours, backend)
    case.variants.extend(Variant(name, call, call) for name, call in calls.items())
    return case


def rff_features_case(batch: int, device: str, compiled: bool) -> Case:
    torch.manual_seed(SEED)
    sizes = 256, 1024
    inputs = [
        torch.randn(batch, sizes[0]),
        torch.randn(sizes[1], sizes[0]) / 16,
        torch.randn(sizes[1]),
    ]
    inputs = [t.to(device) for t in inputs]

    def function(x: Tensor, omega: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, omega, bias).sin()

    flops = 2.0 * 3 * batch * sizes[0] * sizes[1]
    available = backends("rff_features", *inputs)
    ours = ops.rff_features
    return with_gradients("rff_features", batch, inputs, function, ours, available, flops, compiled)


def mlp_case(batch: int, device: str, compiled: bool) -> Case:
    """One critic, gradients of its parameters and input included."""
    torch.manual_seed(SEED)
    model = nn.TwinCritic(STATE, ACTION).q1.to(device)
    parameters = [p.detach() for p in model.parameters()]
    inputs = [torch.randn(batch, model.in_dim, device=device), *parameters]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return eager.mlp(x, parameters)

    def ours(x: Tensor, *parameters: Tensor, backend: str) -> Tensor:
        activations = model.activations
        return ops.mlp(x, parameters[::2], parameters[1::2], activations, backend=backend)

    flops = 2.0 * 3 * batch * sum(p.numel() for p in parameters if p.ndim == 2)
    available = backends("mlp", inputs[0], parameters[::2], parameters[1::2], model.activations)
    return with_gradients("mlp", batch, inputs, function, ours, available, flops, compiled)


def score_matching_loss_case(batch: int, device: str, compiled: bool) -> Case:
    """Diff-SR's loss from psi and zeta's last hidden layer on."""
    torch.manual_seed(SEED)
    features, hidden_dim = 256, 512
    last = torch.nn.Linear(hidden_dim, features * STATE)
    level = 0.391 + 0.576 * torch.rand(batch)
    offset = (-(1 - level).sqrt()[:, None] * 0.449 * torch.randn(batch, STATE)).to(device)
    score_weight = (-(1 - level) * 0.449).to(device)
    inputs = [torch.randn(batch, features), torch.randn(batch, hidden_dim), last.weight, last.bias]
    inputs = [t.detach().to(device) for t in inputs]

    def function(psi: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        zeta = torch.nn.functional.linear(hidden, weight, bias).unflatten(1, (features, STATE))
        score = torch.einsum("bd,bds->bs", psi, zeta)
        error = score_weight.to(psi.dtype)[:, None] * score + offset.to(psi.dtype)
        return error.square().sum(1).mean()

    def ours(*at: Tensor, backend: str) -> Tensor:
        return ops.score_matching_loss(*at, offset, score_weight, backend=backend)

    flops = 2.0 * 3 * batch * last.weight.numel()
    available = backends("score_matching_loss", *inputs, offset, score_weight)
    return with_gradients(
        "score_matching_loss", batch, inputs, function, ours, available, flops, compiled
    )


def denoising_loss_case(batch: int, device: str, compiled: bool) -> Case:
    torch.manual_seed(SEED)
    denoiser = nn.Denoiser(STATE, ACTION).to(device)
    schedule = DiffusionSchedule.cosine(CHAIN)
    state, action = (
        torch.randn(batch, STATE, device=device),
        torch.rand(batch, ACTION, device=device),
    )
    noise, t = torch.randn_like(action), torch.randint(0, CHAIN, (batch,), device=device)
    names = [name for name, _ in denoiser.named_parameters()]
    inputs = [p.detach() for p in denoiser.parameters()]
    embedding = nn.modules.time_embedding(t, denoiser.time_dim)
    levels = schedule.alphas_cumprod.to(device)[t][:, None]

    def function(*parameters: Tensor) -> Tensor:
        dtype = parameters[0].dtype
        x, z, a, s = action.to(dtype), noise.to(dtype), levels.to(dtype), state.to(dtype)
        x = a.sqrt() * x + (1 - a).sqrt() * z
        time_features = eager.mlp(embedding.to(dtype), parameters[:4])
        eps = eager.mlp(torch.cat([x, time_features, s], dim=1), parameters[4:])
        return torch.nn.functional.mse_loss(eps, z)

    def ours(*parameters: Tensor, backend: str) -> Tensor:
        own = copy.copy(denoiser)
        call = _Loss(own, schedule, state, action, t, noise, backend)
        values = dict(zip((f"denoiser.{n}" for n in names), parameters, strict=True))
        return torch.func.functional_call(call, values, ())

    weights = sum(p.numel() for p in inputs if p.ndim == 2)
    available = backends("denoising_loss", denoiser, schedule, state, action)
    return with_gradients(
        "denoising_loss", batch, inputs, function, ours, available, 6.0 * batch * weights, compiled
    )


class _Loss(torch.nn.Module):
    """The denoising loss as a module, so that its parameters can be given."""

    def __init__(self, denoiser: nn.Denoiser, *arguments: Any) -> None:
        super().__init__()
        self.denoiser, self.arguments = denoiser, arguments

    def forward(self) -> Tensor:
        schedule, state, action, t, noise, backend = self.arguments
        return ops.denoising_loss(
            self.denoiser, schedule, state, action, t=t, noise=noise, backend=backend
        )


def cases(device: str, *, small: bool, compiled: bool) -> Iterator[Callable[[], Case]]:
    """What makes each case, so that one that fails stops no other."""
    batches, chain, ascent, hidden = [1, 256, 4096], CHAIN, ASCENT, 256
    if small:
        batches, chain, ascent, hidden = [1, 9], 4, 3, 32
    usual = batches[1]
    for batch in batches:
        c = compiled and batch == usual
        yield lambda b=batch, c=c: reverse_diffusion_case(b, chain, hidden, device, c)
    for batch in batches:
        c = compiled and batch == usual
        yield lambda b=batch, c=c: action_gradient_case(b, ascent, hidden, device, c)
    for op in ("reverse_step", "q_sample"):
        yield lambda op=op: elementwise_case(op, usual, device, compiled)
    yield lambda: rff_features_case(usual, device, compiled)
    yield lambda: mlp_case(usual, device, compiled)
    yield lambda: denoising_loss_case(usual, device, compiled)
    yield lambda: score_matching_loss_case(usual, device, compiled)


# -- measuring -------------------------------------------------------------------------------------


def check(case: Case) -> dict[str, float]:
    """Every variant's median error against float64. What torch can't compile is left out.

    Raises:
        WrongResultError: one is larger than its bound.
    """
    exact = case.exact()
    errors = {}
    for variant in list(case.variants):
        try:
            result = variant.given()
        except Exception as error:
            if variant.name != COMPILED:
                raise
            say(f"  {COMPILED} left out: {type(error).__name__}")
            case.variants.remove(variant)
            continue
        error = (result.double() - exact).abs().median().item()
        errors[variant.name] = error
        bound = variant.bound or 2 * errors[EAGER] + 2e-7
        if not error <= bound:
            raise WrongResultError(f"{case}: {variant.name!r} is off by {error}, not {bound}")
    return errors


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds_between_events(call: Callable[[], Any], times: int) -> float:
    """Seconds of one of several calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def seconds_by_the_clock(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def interleaved(
    calls: dict[str, Callable[[], Any]],
    measure: Callable[..., float],
    rounds: int,
    warm_up_calls: int = 3,
) -> dict[str, list[float]]:
    """Seconds of every call, all in turns in random order, so that a change of clocks meets all."""
    times = {}
    for name, call in calls.items():
        for _ in range(warm_up_calls):
            call()
        times[name] = max(1, min(1000, math.ceil(LEAST_SECONDS / max(measure(call, 1), 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(measure(calls[name], times[name]))
    return samples


def ceilings() -> dict[str, float]:
    """Of this GPU: FLOP/s in each precision, and bytes a second."""
    result = {}
    n = 8192
    for name, dtype, allowed in (
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(allowed)
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        samples = interleaved({name: lambda a=a, b=b: a @ b}, seconds_between_events, 5)
        result[name] = 2.0 * n**3 / min(samples[name])
    torch.set_float32_matmul_precision("highest")
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    samples = interleaved({"copy": lambda: target.copy_(source)}, seconds_between_events, 5)
    result["bytes"] = 2.0 * source.numel() / min(samples["copy"])
    return result


def measure_case(case: Case, peaks: dict[str, float], device: str) -> list[dict[str, Any]]:
    """A row of results for every variant and, where that works, for it in a captured graph."""
    errors = check(case)
    calls: dict[str, Callable[[], Any]] = {v.name: v.call for v in case.variants}
    if device == "cuda":
        for variant in case.variants:
            if variant.name == COMPILED:
                continue
            try:
                calls[f"{variant.name}, CUDA graph"] = captured(variant.call)
            except RuntimeError as error:
                say(f"  {variant.name} can't be captured: {error}")
    if device == "cuda":
        samples = interleaved(calls, seconds_between_events, ROUNDS)
    else:  # a dry run: only that it works
        samples = interleaved(calls, seconds_by_the_clock, 2, warm_up_calls=0)
    rows = []
    precisions = {v.name: v.precision for v in case.variants}
    for name, seconds in samples.items():
        plain = name.removesuffix(", CUDA graph")
        q25, median, q75 = statistics.quantiles(seconds, n=4, method="inclusive")
        row = {
            "op": case.op,
            "batch": case.batch,
            "variant": name,
            "median": median,
            "q25": q25,
            "q75": q75,
            "error": errors[plain],
            "roofline": None,
        }
        if peaks:
            bound = max(case.flops / peaks[precisions[plain]], case.bytes / peaks["bytes"])
            row["roofline"] = bound / median
        rows.append(row)
    return rows


# -- the report ------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Times, ratios to eager and to captured eager, shares of the roofline."""
    lines = ["| op | batch | variant | time | eager / it | captured eager / it | roofline |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    medians = {(r["op"], r["batch"], r["variant"]): r["median"] for r in rows}
    for row in rows:
        at = row["op"], row["batch"]

        def ratio(to: str, at: tuple[str, int] = at, of: float = row["median"]) -> str:
            return f"{medians[(*at, to)] / of:.1f}x" if (*at, to) in medians else "-"

        share = "-" if row["roofline"] is None else f"{100 * row['roofline']:.1f}%"
        time_text = f"{1e6 * row['median']:,.1f} us"
        cells = [
            row["op"],
            str(row["batch"]),
            row["variant"],
            time_text,
            ratio(EAGER),
            ratio(GRAPH),
        ]
        lines.append(f"| {' | '.join([*cells, share])} |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "diffcore": diffcore.__version__,
        "config": diffcore.show_config(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        result["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        result["commit"] = ""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = properties.name
        result["multiprocessors"] = properties.multi_processor_count
        result["cuda"] = torch.version.cuda
    return result


def save(results: dict[str, Any], folder: Path) -> Path:
    gpu = "-".join(results["environment"]["gpu"].lower().split())
    path = folder / f"{results['environment']['date'][:10]}-{gpu}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def say(text: str) -> None:
    print(text, flush=True)


def call_everything_once(device: str) -> None:
    """Every kernel on a small input, for compute-sanitizer."""
    for make in cases(device, small=True, compiled=False):
        case = make()
        for variant in case.variants:
            if variant.name != EAGER:
                variant.given()
        say(str(case))
    if device == "cuda":
        torch.cuda.synchronize()


def use_kernels_on_cpu() -> None:
    """Has CPU tensors run on the tests' build of the CUDA sources and in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton looked when diffcore was imported
        sys.exit("--dry-run needs TRITON_INTERPRET=1 in the environment")
    os.environ.setdefault("CUDA_ON_CPU_DEVICE", "3,232448,9")
    sys.path.insert(0, str(ROOT / "python_tests" / "gpu"))
    import cuda_builds

    _native._cuda = cuda_builds.load(cuda_builds.build_for_cpu())
    _native.cuda_unavailable = None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python bench/gpu_report.py", description=__doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="on the CPU, tiny sizes, nothing stored")
    add("--small-calls", action="store_true", help="call every kernel once, time nothing")
    add("--no-compile", action="store_true", help="leave out torch.compile")
    add("--minutes", type=float, default=3.5, help="after which no new case begins")
    add("--output", type=Path, default=ROOT / "bench" / "results", help="where JSON goes")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        say(f"torch {torch.__version__} sees no GPU; --dry-run shows that everything works")
        return 1
    if options.dry_run:
        use_kernels_on_cpu()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_float32_matmul_precision("highest")
    if options.small_calls:
        call_everything_once(device)
        return 0

    results: dict[str, Any] = {"environment": environment(), "peaks": {}, "rows": []}
    if device == "cuda":
        results["peaks"] = ceilings()
        for name, peak in results["peaks"].items():
            unit = "TB/s" if name == "bytes" else "TFLOP/s"
            say(f"measured ceiling, {name}: {peak / 1e12:.2f} {unit}")
    until, failures = time.monotonic() + 60 * options.minutes, []
    compiled = device == "cuda" and not options.no_compile
    for make in cases(device, small=options.dry_run, compiled=compiled):
        if time.monotonic() > until:
            failures.append("out of time: the remaining cases weren't measured")
            break
        try:
            case = make()
            say(str(case))
            results["rows"] += measure_case(case, results["peaks"], device)
        except Exception as error:  # the other cases are worth having
            failures.append(f"{type(error).__name__}: {error}")
    say("\n" + table(results["rows"]))
    if device == "cuda":
        say(f"\nwrote {save(results, options.output)}")
    for failure in failures:
        say(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
