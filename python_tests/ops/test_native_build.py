"""The compiled module in its process: instruction sets, threads, fork, OpenMP."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ISAS, run_script
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _native

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

CALL_EVERYTHING = """
import torch, diffcore
from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _native
torch.manual_seed(0)
torch.set_num_threads(2)
state, action = torch.randn(64, 5), torch.rand(64, 3)
denoiser, critic = nn.Denoiser(5, 3, 16).requires_grad_(False), nn.TwinCritic(5, 3, 16)

def call():
    generator = torch.Generator().manual_seed(1)
    drawn = ops.reverse_diffusion(
        denoiser, DiffusionSchedule.linear(6), state, generator=generator, backend="cpu"
    )
    return torch.cat([drawn, ops.action_gradient(critic, state, action, backend="cpu")])
"""


def test_the_module_is_built() -> None:
    assert _native.unavailable is None
    assert ISAS[-1] == "baseline"
    assert _native._core.isa() in ISAS
    assert _native._core.max_layers == _native.max_layers


# -- lists -----------------------------------------------------------------------------------------


def square(layers: int) -> list[Tensor]:
    """Parameters of a network that maps 4 to 4."""
    return [torch.randn(4, 4) if n % 2 == 0 else torch.randn(4) for n in range(2 * layers)]


def names(layers: int) -> str:
    return ",".join(["relu"] * layers)


def call_action_gradient(layers: int) -> None:
    state, action, q = torch.randn(3, 2), torch.randn(3, 2), square(layers)
    settings = ("relu", "float32", 2, 0.1, None, "none", "adam", 1e-5, -1.0, 1.0, "cpu")
    torch.ops.diffcore.action_gradient(state, action, q, q, *settings)


def call_reverse_diffusion(layers: int) -> None:
    rows, steps = torch.randn(3, 1), torch.randn(2, 4)
    coefficients, noise = torch.randn(2, 7), torch.randn(2, 3, 1)
    settings = (0.0, 1.0, "relu", "float32", False, "cpu")
    torch.ops.diffcore.reverse_diffusion(
        rows, rows, noise, None, square(layers), coefficients, steps, *settings
    )


def call_denoising_loss(layers: int) -> None:
    rows, t, levels = torch.randn(3, 1), torch.zeros(3, dtype=torch.int64), torch.randn(2, 2)
    tables = (levels, torch.randn(2, 4), "relu", "mean")
    settings = (*tables, [True] * 3, square(layers), "float32", "cpu")
    torch.ops.diffcore.denoising_loss(rows, rows, rows, None, t, *settings)


MLP = torch.ops.diffcore.mlp
CRITIC_LOSS = torch.ops.diffcore.critic_loss
MLP_BACKWARD = torch.ops.diffcore.mlp_backward
LAYERS = "networks of 1 to 16 layers are expected, got 17"
DEEPER = "networks of 2 to 16 layers are expected, got "
NETWORKS = "1 to 8 networks of one shape are expected, got 9"
X, Y = torch.ones(3, 4), torch.ones(9, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP(X, square(9), "relu", False, "float32", "cpu"), NETWORKS),
        (lambda: MLP(X, square(17), names(17), False, "float32", "cpu"), LAYERS),
        (lambda: MLP(X, square(17), names(17), True, "float32", "cpu"), LAYERS),
        (
            lambda: MLP_BACKWARD(Y, X, Y, square(9), "relu", True, True, "float32", "cpu"),
            NETWORKS,
        ),
        (
            lambda: CRITIC_LOSS(X, X, None, square(9), "relu", [True, True], "float32", "cpu"),
            NETWORKS,
        ),
        (lambda: call_action_gradient(1), DEEPER + "1$"),
        (lambda: call_action_gradient(17), DEEPER + "17"),
        (lambda: call_reverse_diffusion(2 + 1), DEEPER + "1$"),
        (lambda: call_reverse_diffusion(2 + 17), DEEPER + "17"),
        (lambda: call_denoising_loss(2 + 17), LAYERS),
    ],
)
def test_lists_that_the_kernels_cannot_take_are_refused(
    call: Callable[[], object], message: str
) -> None:
    """The public functions run them on the reference; torch's ops are there for everyone."""
    with pytest.raises(ValueError, match=message):
        call()


# -- instruction sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_an_instruction_set(isa: str) -> None:
    script = CALL_EVERYTHING + "print(_native._core.isa(), bool(torch.isfinite(call()).all()))"
    result = run_script(script, DIFFCORE_ISA=isa)
    assert result.stdout == f"{isa} True\n", result.stderr


def test_best_instruction_set_is_the_default() -> None:
    script = "from diffcore.ops import _native; print(_native._core.isa())"
    assert run_script(script, DIFFCORE_ISA="").stdout == f"{ISAS[0]}\n"


def test_unknown_instruction_set() -> None:
    """A clear error at the first call, from any op; importing the package still works."""
    result = run_script(CALL_EVERYTHING + "call()", DIFFCORE_ISA="sse9")
    assert result.returncode == 1
    message = r"RuntimeError: DIFFCORE_ISA: unknown instruction set 'sse9'; this build has: (.*)"
    built = re.search(message, result.stderr)
    assert built is not None, result.stderr
    assert set(ISAS) <= set(built[1].split(", "))


def test_instruction_set_that_this_cpu_lacks() -> None:
    with pytest.raises(RuntimeError) as unknown:
        _native._core.use_isa("none")
    built = str(unknown.value).partition("this build has: ")[2].split(", ")
    missing = [isa for isa in built if isa not in ISAS]
    if not missing:
        pytest.skip("this CPU has every instruction set of the build")
    result = run_script(CALL_EVERYTHING + "call()", DIFFCORE_ISA=missing[0])
    assert result.returncode == 1  # and not the end by SIGILL
    assert f"DIFFCORE_ISA: this CPU doesn't support '{missing[0]}'" in result.stderr


ARM_TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")  # Debian's g++-aarch64-linux-gnu, qemu-user


@pytest.mark.skipif(
    not all(map(shutil.which, ARM_TOOLS)), reason=f"needs {' and '.join(ARM_TOOLS)}"
)
def test_neon_kernels_agree_with_the_baseline(tmp_path: Path) -> None:
    """On an emulated ARM processor."""
    compiler, emulator = ARM_TOOLS
    root = Path(__file__).parents[2]
    sources = root / "csrc" / "cpu"
    flags = ["-std=gnu++17", "-O2", "-fopenmp", "-fno-math-errno", "-static", "-w", f"-I{sources}"]

    def compile_cpp(source: Path, output: str, *arguments: str) -> str:
        command = [compiler, *flags, *arguments, str(source), "-o", str(tmp_path / output)]
        subprocess.run(command, check=True)
        return command[-1]

    objects = [
        compile_cpp(sources / "kernels.cpp", f"{isa}.o", "-c", f"-DDIFFCORE_ISA={isa}", guard)
        for isa, guard in (("neon", "-DDIFFCORE_ISA_NEON"), ("baseline", "-DDIFFCORE_ISA_BASELINE"))
    ]
    objects.append(compile_cpp(sources / "dispatch.cpp", "dispatch.o", "-c"))
    program = compile_cpp(Path(__file__).with_name("neon_kernels.cpp"), "compare", *objects)
    result = subprocess.run([emulator, program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("\n0 failures\n")


# -- threads ---------------------------------------------------------------------------------------


def test_several_python_threads_at_once(isa: str, pack_budget: Callable[[int], None]) -> None:
    """More networks than packs are kept, so that threads build and drop packs all the time."""
    pack_budget(100_000)
    schedule, state = DiffusionSchedule.linear(5), torch.randn(33, 5)
    x, noise = torch.randn(33, 3), torch.randn(5, 33, 3)
    networks = [
        (nn.Denoiser(5, 3, 20).requires_grad_(False), nn.TwinCritic(5, 3, 20)) for _ in range(12)
    ]

    def call(i: int) -> Tensor:
        denoiser, critic = networks[i % len(networks)]
        actions = ops.reverse_diffusion(denoiser, schedule, state, x_init=x, noise=noise)
        return ops.action_gradient(critic, state, actions, max_norm=0.1)

    expected = [call(i) for i in range(len(networks))]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, range(240)))
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i % len(networks)])


def test_several_teams_at_once(teams: None, set_threads: Callable[[int], None]) -> None:
    """Each call's threads meet each other, and nobody else."""
    schedule, denoiser = DiffusionSchedule.linear(20), nn.Denoiser(5, 3, 64).requires_grad_(False)
    x, noise, states = torch.randn(2, 3), torch.randn(20, 2, 3), torch.randn(4, 2, 5)

    def call(i: int) -> Tensor:
        set_threads(2)  # torch has a number for each thread
        return ops.reverse_diffusion(denoiser, schedule, states[i % 4], x_init=x, noise=noise)

    expected = [call(i) for i in range(4)]
    with ThreadPoolExecutor(3) as pool:
        before = _native._core.teams_run()
        results = list(pool.map(call, range(60)))
        assert _native._core.teams_run() - before == 60
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i % 4])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a CPU to itself")
def test_late_teams_are_done_without() -> None:
    """Two threads that share a CPU wait for each other all the time."""
    script = """
import os
import torch
from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _native

os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
torch.set_num_threads(2)
denoiser = nn.Denoiser(5, 3).requires_grad_(False)
before = _native._core.team_threads(2)
for _ in range(30):
    ops.reverse_diffusion(denoiser, DiffusionSchedule.cosine(50), torch.randn(1, 5))
print(before, _native._core.team_threads(2))
"""
    assert run_script(script).stdout == "2 1\n"


def test_other_python_threads_run_on() -> None:
    """The GIL is released: a thread that sleeps for a millisecond at a time isn't kept waiting for a
    call of hundreds."""
    denoiser = nn.Denoiser(17, 6).requires_grad_(False)
    arguments = (denoiser, DiffusionSchedule.cosine(100), torch.randn(512, 17))
    ops.reverse_diffusion(*arguments)
    ended = threading.Event()

    def call() -> None:
        ops.reverse_diffusion(*arguments)
        ended.set()

    caller = threading.Thread(target=call)
    rounds = 0
    caller.start()
    while not ended.is_set():
        time.sleep(0.001)
        rounds += 1
    caller.join()
    assert rounds > 10


def test_the_process_ends_while_a_thread_that_nobody_waits_for_computes() -> None:
    """In one call that looks for packs again and again, also while what is static is destroyed."""
    script = """
import threading, time, torch
from diffcore import nn, ops

torch.set_num_threads(1)
psi, zeta = (nn.MLP(2, 8, out, 1, "relu", "uniform") for out in (4, 8))
optimizer = torch.optim.Adam([*psi.parameters(), *zeta.parameters()])
rows = [torch.randn(10**6, 2, 2) for _ in range(3)]
arguments = (psi, zeta, *rows, torch.randn(10**6, 2), optimizer)
step = threading.Thread(target=ops.representation_step, args=arguments, daemon=True)
before = psi.layers[0].bias.clone()
step.start()
while torch.equal(psi.layers[0].bias, before):
    time.sleep(0.001)
print(step.is_alive())
"""
    result = run_script(script)
    assert result.stdout == "True\n"
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "call",
    [
        "ops.reverse_diffusion(denoiser, schedule, state)",
        "network(states)",
    ],
    ids=["reverse_diffusion", "mlp"],
)
def test_the_process_ends_while_a_thread_comes_back_from_a_kernel(call: str) -> None:
    """Python 3.11 ends such a thread by unwinding it, which aborts where that meets a destructor.

    Torch's own operations abort so as well: the thread must be in a kernel when the interpreter ends.
    """
    script = f"""
import threading, time, torch
from diffcore import DiffusionSchedule, nn, ops

torch.set_num_threads(1)
denoiser = nn.Denoiser(16, 2, 256).requires_grad_(False)
network = nn.MLP(16, 256, 2).requires_grad_(False)
schedule = DiffusionSchedule.cosine(20)
state, states = torch.randn(4096, 16), torch.randn(65536, 16)
calls = 0

def keep_calling():
    global calls
    while True:
        {call}  # some 100 ms
        calls += 1

class Lasting:
    def __del__(self):
        time.sleep(1)  # while the interpreter ends: long enough for a call to end as well

lasting = Lasting()
threading.Thread(target=keep_calling, daemon=True).start()
while calls < 1:
    time.sleep(0.001)
time.sleep(0.02)  # into the next call's kernel
"""
    result = run_script(script)
    assert result.returncode == 0, result.stderr


@needs_fork
def test_after_fork() -> None:
    """A child has no OpenMP pool to wait for: it computes alone, and the same numbers."""
    script = """
import os
expected = call()
pid = os.fork()
if pid == 0:
    grandchild = os.fork()
    same = torch.equal(call(), expected)
    if grandchild:
        same = same and os.waitpid(grandchild, 0)[1] == 0
    os._exit(0 if same else 1)
print(os.waitpid(pid, 0)[1], torch.equal(call(), expected))
"""
    result = run_script(CALL_EVERYTHING + script)
    assert result.stdout == "0 True\n", result.stderr


@needs_fork
def test_fork_while_another_thread_computes() -> None:
    """No lock may stay taken in the child for ever."""
    script = """
import os, threading
expected, stop = call(), threading.Event()

def keep_calling():
    torch.set_num_threads(1)
    while not stop.is_set():
        critic.q1.layers[0].bias.data.add_(0.0)
        call()

worker = threading.Thread(target=keep_calling)
worker.start()
statuses = []
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(call(), expected) else 1)
    statuses.append(os.waitpid(pid, 0)[1])
stop.set()
worker.join()
print(set(statuses))
"""
    result = run_script(CALL_EVERYTHING + script)
    assert result.stdout == "{0}\n", result.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_one_openmp_runtime() -> None:
    """The extension shares torch's, and its threads, when torch is imported first, as we do."""
    script = """
call()
torch.randn(512, 512) @ torch.randn(512, 512)
words = open("/proc/self/maps").read().split()
libraries = {word for word in words if ".so" in word}
runtimes = {path for path in libraries if any(n in path for n in ("gomp", "iomp", "libomp"))}
print(len(runtimes), runtimes)
"""
    result = run_script(CALL_EVERYTHING + script)
    assert result.stdout.startswith("1 "), result.stdout + result.stderr
