"""Kernels on the CPU with nothing but NumPy: checks that also run under AddressSanitizer, and on
sources with planted faults, where they must fail.

    python emulated.py LIBRARY linear|chain    # exits with 1 if a check fails
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import cuda_builds
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
SOURCES = {
    "linear": (HERE / "emulator_kernels.cu",),
    "chain": (HERE / "chain_export.cu", cuda_builds.CUDA / "reverse_diffusion.cu"),
}
PRECISIONS = {"float32": 0, "tf32": 1, "bfloat16": 2, "float16": 3}
#: Half a unit in the last place of what is multiplied, relative.
ROUNDING = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-9, "float16": 2.0**-11}

#: CUDA_ON_CPU_DEVICE of devices on which the chain takes all its ways: blocks alone with weights that
#: stay and that stream, clusters, and groups with a barrier in software.
DEVICES = {
    "alone": "2,232448,9",
    "streaming": "1,110000,8",
    "clusters": "16,232448,9",
    "grid": "16,166912,8",
}

#: Devices for which launchers plan groups of one size alone, whatever it costs: two groups, of which
#: each has several tiles where there are rows enough.
GROUPS = {
    "alone": "3,232448,9,1",
    "streaming": "1,110000,8,1",
    **{f"cluster_of_{size}": f"{2 * size},232448,9,{size}" for size in (2, 4, 8)},
    **{f"grid_of_{size}": f"{2 * size},166912,8,{size}" for size in (2, 4, 8)},
}

Array = NDArray[np.float32]


def build(name: str, directory: Path = cuda_builds.CUDA, flags: Sequence[str] = ("-O1",)) -> Path:
    """The library of a check, from the kernels in `directory`."""
    sources = [
        directory / path.name if path.parent == cuda_builds.CUDA else path for path in SOURCES[name]
    ]
    files = [*sources, *cuda_builds.headers(directory)]
    key = cuda_builds.digest(name, tuple(flags), files=files)
    library = cuda_builds.BUILD / "emulated" / f"{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}.so")
    command = [os.environ.get("CXX", "g++"), *cuda_builds.CPU_FLAGS, *flags, f"-I{directory}"]
    cuda_builds.run([*command, "-shared", "-x", "c++", *sources, "-o", unfinished])
    unfinished.rename(library)
    return library


def address(array: NDArray[np.generic] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if array is None else array.ctypes.data)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


# -- one layer -------------------------------------------------------------------------------------

#: rows of the tile, rows, k, columns
LINEAR_SIZES = [
    (16, 16, 64, 32),
    (16, 5, 7, 3),
    (16, 1, 33, 9),
    (16, 11, 256, 40),
    (16, 16, 40, 300),
    (32, 32, 100, 31),
    (32, 17, 65, 257),
]


def linear(
    library: ctypes.CDLL, precision: str, tile_rows: int, x: Array, w: Array, resident: bool
) -> Array:
    rows, columns = len(x), len(w)
    padded = -(-columns // 8) * 8
    y = np.full((rows + 1, padded), 7, np.float32)  # a row too many, which stays as it is
    packed = np.zeros((padded, x.shape[1] + 16), np.float32)
    library.linear_layer(
        PRECISIONS[precision],
        tile_rows,
        rows,
        x.shape[1],
        columns,
        address(x),
        address(w),
        int(resident),
        address(packed),
        address(y),
    )
    assert (y[rows] == 7).all(), "written beyond the last row"
    return y[:rows]


def check_linear(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    sizes = [(4, 3, 37, 20), *LINEAR_SIZES]
    for precision, size, resident in itertools.product(PRECISIONS, sizes, (True, False)):
        tile_rows, rows, k, columns = size
        if tile_rows < 16 and precision != "float32":
            continue
        x, w = normal(rng, rows, k), normal(rng, columns, k)
        y = linear(library, precision, tile_rows, x, w, resident)
        exact = x.astype(np.float64) @ w.astype(np.float64).T
        size_of_terms = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
        bound = (2.1 * ROUNDING[precision] + k * 2.0**-24) * size_of_terms + 1e-6
        case = precision, size, resident
        assert (np.abs(y[:, :columns] - exact) <= bound).all(), case
        assert (y[:, columns:] == 0).all(), case


# -- the chain -------------------------------------------------------------------------------------


class Network:
    """A denoiser with mish, in the order of its parameters."""

    def __init__(self, state: int, action: int, hidden: int, layers: int, time: int = 8) -> None:
        rng = np.random.default_rng(1)
        widths = [time, hidden, time, action + time + state, *([hidden] * layers), action]
        shapes = [(time, hidden), (hidden, time), *itertools.pairwise(widths[3:])]
        self.sizes = state, action, time, hidden, layers + 1
        self.layers = [
            (normal(rng, n, k) / np.float32(np.sqrt(k)), normal(rng, n)) for k, n in shapes
        ]

    def eps(self, x: NDArray[np.float64], embedding: Array, state: Array) -> NDArray[np.float64]:
        time = self.through(self.layers[:2], embedding.astype(np.float64)[None])
        joined = [x, np.repeat(time, len(x), 0), state.astype(np.float64)]
        return self.through(self.layers[2:], np.concatenate(joined, 1))

    @staticmethod
    def through(layers: list[tuple[Array, Array]], h: NDArray[np.float64]) -> NDArray[np.float64]:
        for i, (weight, bias) in enumerate(layers):
            if i:
                h = h * np.tanh(np.logaddexp(0, h))
            h = h @ weight.astype(np.float64).T + bias
        return h


#: Coefficients of every kind, among them of x0 at the step before.
TABLE = np.array(
    [
        [1.3, 0.8, 0.4, 0.5, -0.1, 0.3, 0.0],
        [1.2, 0.7, 0.5, 0.4, 0.1, 0.2, -0.2],
        [1.1, 0.5, 0.6, 0.3, 0.0, 0.0, 0.1],
    ],
    np.float32,
)


def run_chain(
    library: ctypes.CDLL, network: Network, precision: str, state: Array, x: Array, noise: Array
) -> tuple[Array, Array, Array]:
    """(actions, trajectory, time embedding); both results are checked not to overflow."""
    batch, action = x.shape
    steps = len(noise)
    rng = np.random.default_rng(2)
    embedding = normal(rng, steps, network.sizes[2])
    parameters = [array for layer in network.layers for array in layer]
    pointers = (ctypes.c_void_p * len(parameters))(*(p.ctypes.data for p in parameters))
    sizes = (ctypes.c_int * 7)(batch, *network.sizes, steps)
    actions = np.full((batch + 1, action), 7, np.float32)
    trajectory = np.full(((steps + 1) * batch + 1, action), 7, np.float32)
    bytes_needed = ctypes.c_int64()
    library.chain.restype = ctypes.c_char_p

    def call(actions: Array | None, workspace: NDArray[np.uint8] | None) -> None:
        error = library.chain(
            sizes,
            PRECISIONS[precision],
            pointers,
            address(embedding),
            address(TABLE),
            address(state),
            address(x),
            address(noise),
            ctypes.c_uint64(0),
            None,
            address(trajectory),
            address(actions),
            address(workspace),
            ctypes.byref(bytes_needed),
        )
        assert error is None, error

    call(None, None)
    guard = 64
    workspace = np.full(bytes_needed.value + guard, 255, np.uint8)
    call(actions, workspace)
    assert (workspace[-guard:] == 255).all(), "written beyond the workspace"
    assert (actions[batch] == 7).all(), "written beyond the last action"
    assert (trajectory[-1] == 7).all(), "written beyond the trajectory"
    return actions[:batch], trajectory[:-1].reshape(steps + 1, batch, action), embedding


def exact_chain(
    network: Network, state: Array, x_init: Array, noise: Array, embedding: Array
) -> NDArray[np.float64]:
    x, before, steps = x_init.astype(np.float64), np.float64(0), []
    for z, e, row in zip(noise, embedding, TABLE.astype(np.float64), strict=True):
        steps.append(x)
        eps = network.eps(x, e, state)
        x0 = np.clip(row[0] * x - row[1] * eps, -1, 1)
        x = row[2] * x0 + row[3] * x + row[4] * eps + row[5] * z + row[6] * before
        before = x0
    return np.stack([*steps, x])


#: (state, action, hidden, layers), rows. The last two are so wide that groups of blocks pay: in
#: clusters, and with the slower barrier in software.
CHAIN_SIZES = [
    ((3, 2, 24, 2), 5),
    ((5, 9, 70, 1), 37),
    ((2, 1, 200, 2), 18),
    ((2, 1, 256, 3), 3),
]


def check_chain(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    for device, (shape, rows) in itertools.product(DEVICES.values(), CHAIN_SIZES):
        os.environ["CUDA_ON_CPU_DEVICE"] = device  # putenv, which the library sees
        network = Network(*shape)
        state, x = normal(rng, rows, shape[0]), normal(rng, rows, shape[1])
        noise = normal(rng, len(TABLE), rows, shape[1])
        for precision in PRECISIONS:
            actions, trajectory, embedding = run_chain(library, network, precision, state, x, noise)
            exact = exact_chain(network, state, x, noise, embedding)
            bound = 3e-6 if precision == "float32" else 16 * ROUNDING[precision]
            case = device, shape, rows, precision
            assert np.abs(trajectory - exact).max() < bound, case
            assert np.abs(actions - np.clip(exact[-1], -1, 1)).max() < bound, case


CHECKS = {"linear": check_linear, "chain": check_chain}

if __name__ == "__main__":
    CHECKS[sys.argv[2]](ctypes.CDLL(sys.argv[1]))
