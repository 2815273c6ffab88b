"""The library's noise: Philox 4x32-10 and Box-Muller, the same on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffcore import DiffusionSchedule, nn, ops
from diffcore.ops import _native
from diffcore.ops._philox import draw_seed, normals, philox


def native_normals(seed: int, step: int, rows: int, columns: int, *, first_row: int = 0) -> Tensor:
    out = torch.empty(rows, columns)
    _native._core.normals(seed % 2**64, step, first_row, rows, columns, out.data_ptr())
    return out


# -- the generator ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123's kat_vectors, "philox4x32 10".
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    seed = key[0] | key[1] << 32
    signed = seed - 2**64 if seed >= 2**63 else seed
    words = philox(torch.tensor(signed), [torch.tensor(c) for c in counter])
    assert tuple(int(w) for w in words) == expected


def test_first_normals_by_hand(backend: str) -> None:
    """Box-Muller of the known answer to counter 0, key 0."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    expected = []
    for a, b in (words[:2], words[2:]):
        u1, u2 = ((a >> 8) + 1) / 2**24, (b >> 8) / 2**24
        radius = math.sqrt(-2 * math.log(u1))
        expected += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
    drawn = (
        normals(torch.tensor(0), 0, 1, 4) if backend == "reference" else native_normals(0, 0, 1, 4)
    )
    torch.testing.assert_close(drawn[0], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 6, 17, 33])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 65])
def test_native_noise_is_the_reference_s(isa: str, rows: int, columns: int) -> None:
    for seed, step, first_row in (
        (0, 0, 0),
        (2**63 - 1, 1, 7),
        (-1, 2**32 - 1, 2**32 - 2),  # the row's upper word changes within the block
        (0x123456789ABCDEF, 100, 2**40),
    ):
        torch.testing.assert_close(
            native_normals(seed, step, rows, columns, first_row=first_row),
            normals(torch.tensor(seed), step, rows, columns, first_row=first_row),
            rtol=0,
            atol=1e-6,
        )


def test_rows_don_t_depend_on_the_split(backend: str) -> None:
    def draw(first_row: int, rows: int) -> Tensor:
        if backend == "cpu":
            return native_normals(5, 3, rows, 6, first_row=first_row)
        return normals(torch.tensor(5), 3, rows, 6, first_row=first_row)

    whole = draw(0, 37)
    for first, rows in ((0, 1), (1, 16), (17, 20)):
        assert torch.equal(draw(first, rows), whole[first : first + rows])


# -- its distribution ------------------------------------------------------------------------------

N = 400_000


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return normals(torch.tensor(2024), 1, N // 8, 8, dtype=torch.float64)


def test_moments(sample: Tensor) -> None:
    """Within four standard deviations of what N independent normals give."""
    z = sample.flatten()
    assert abs(z.mean().item()) < 4 / math.sqrt(N)
    assert abs(z.square().mean().item() - 1) < 4 * math.sqrt(2 / N)
    assert abs(z.pow(3).mean().item()) < 4 * math.sqrt(15 / N)
    assert abs(z.pow(4).mean().item() - 3) < 4 * math.sqrt(96 / N)


def test_kolmogorov_smirnov(sample: Tensor) -> None:
    """The largest distance to the normal distribution function, at level 0.001."""
    z = sample.flatten().sort().values
    cdf = torch.special.ndtr(z)
    above = (torch.arange(1, N + 1).double() / N - cdf).max()
    below = (cdf - torch.arange(N).double() / N).max()
    assert max(above.item(), below.item()) < math.sqrt(-math.log(0.001 / 2) / 2 / N)


def test_columns_rows_and_steps_are_independent(sample: Tensor) -> None:
    next_step = normals(torch.tensor(2024), 2, N // 8, 8, dtype=torch.float64)
    next_seed = normals(torch.tensor(2025), 1, N // 8, 8, dtype=torch.float64)
    rows = N // 8
    # Squares too: the two normals of one Box-Muller pair share their radius.
    for z in (sample, sample.square() - 1):
        correlation = torch.corrcoef(z.T) - torch.eye(8)
        assert correlation.abs().max() < 5 / math.sqrt(rows)
    for other in (sample.roll(1, 0), next_step, next_seed):
        assert abs((sample * other).mean().item()) < 4 / math.sqrt(N)


# -- in the chain ----------------------------------------------------------------------------------


@pytest.fixture
def problem() -> tuple[nn.Denoiser, DiffusionSchedule, Tensor]:
    return nn.Denoiser(5, 3, 16, 2), DiffusionSchedule.linear(6), torch.randn(40, 5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_chain_draws_the_documented_noise(backend: str, problem: tuple) -> None:
    """Step 0 is the start, step i + 1 the i-th step's noise; one draw from a generator keys it."""
    key = draw_seed(seeded(1))
    start = normals(key, 0, 40, 3)
    noise = torch.stack([normals(key, i + 1, 40, 3) for i in range(6)])
    given = {"x_init": start, "noise": noise}
    for missing in (("x_init", "noise"), ("x_init",), ("noise",)):
        kept = {name: value for name, value in given.items() if name not in missing}
        drawn = ops.reverse_diffusion(*problem, generator=seeded(1), backend=backend, **kept)
        expected = ops.reverse_diffusion(*problem, backend=backend, **given)
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_same_seed_same_actions_on_every_backend(isa: str, problem: tuple) -> None:
    native = ops.reverse_diffusion(*problem, generator=seeded(3), backend="cpu")
    reference = ops.reverse_diffusion(*problem, generator=seeded(3), backend="reference")
    torch.testing.assert_close(native, reference, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 11, 13, 16, 17, 39])  # 9: tiles of 5 and 4
def test_a_row_draws_the_same_in_any_batch(isa: str, problem: tuple, rows: int) -> None:
    """Bitwise, whether the noise of several steps is drawn at a time (few rows) or of one."""
    denoiser, schedule, state = problem
    whole = ops.reverse_diffusion(*problem, generator=seeded(3))
    part = ops.reverse_diffusion(denoiser, schedule, state[:rows], generator=seeded(3))
    assert torch.equal(part, whole[:rows])


@torch.no_grad()
def test_generator_moves_on(backend: str, problem: tuple) -> None:
    generator = seeded(5)
    before = generator.get_state()
    first = ops.reverse_diffusion(*problem, generator=generator, backend=backend)
    assert not torch.equal(generator.get_state(), before)
    second = ops.reverse_diffusion(*problem, generator=generator, backend=backend)
    assert not torch.equal(first, second)
    again = ops.reverse_diffusion(*problem, generator=seeded(5), backend=backend)
    assert torch.equal(first, again)


@torch.no_grad()
def test_default_generator(backend: str, problem: tuple) -> None:
    torch.manual_seed(11)
    first = ops.reverse_diffusion(*problem, backend=backend)
    second = ops.reverse_diffusion(*problem, backend=backend)
    torch.manual_seed(11)
    assert torch.equal(first, ops.reverse_diffusion(*problem, backend=backend))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_nothing_is_drawn_where_all_noise_is_given(backend: str, problem: tuple) -> None:
    generator = seeded(5)
    before = generator.get_state()
    x, z = torch.randn(40, 3), torch.randn(6, 40, 3)
    for given in ({"noise": z}, {"noise_scale": 0.0}):
        ops.reverse_diffusion(*problem, x_init=x, generator=generator, backend=backend, **given)
        assert torch.equal(generator.get_state(), before)


@torch.no_grad()
@pytest.mark.parametrize("noise_scale", [0.0, 0.5])
def test_noise_scale_scales_drawn_noise(backend: str, problem: tuple, noise_scale: float) -> None:
    key = draw_seed(seeded(1))
    noise = torch.stack([normals(key, i + 1, 40, 3) for i in range(6)])
    x = torch.randn(40, 3)
    drawn = ops.reverse_diffusion(
        *problem, x_init=x, generator=seeded(1), noise_scale=noise_scale, backend=backend
    )
    given = ops.reverse_diffusion(*problem, x_init=x, noise=noise_scale * noise, backend=backend)
    torch.testing.assert_close(drawn, given, rtol=0, atol=1e-5)
