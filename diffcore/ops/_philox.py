"""The library's noise: Philox 4x32-10 keyed by a seed, counter = (step, row, column).

Every backend draws the same normals for the same seed, up to the rounding of Box-Muller, however
the batch is split. Philox is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def draw_seed(generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
    """A key for one call: int64 ``[]`` drawn from the generator, which moves on by one draw.

    It lies where the generator draws; without one, on `device`, from its default generator.
    """
    device = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=device)


def philox(seed: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """Ten rounds. seed: int64 ``[]``; counter and result: four int64 tensors of 32-bit words."""
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap around, but both halves come out right once masked.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ key0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ key1,
            p0 & _LOW,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def normals(
    seed: Tensor,
    step: int,
    rows: int,
    columns: int,
    *,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals ``[rows, columns]`` of one step.

    Words (0, 1) and (2, 3) of the counter (column // 4, row, step, row >> 32) give the normals of
    columns 4 b .. 4 b + 3 by Box-Muller: sqrt(-2 ln u1) (cos, sin)(2 pi u2), with u1 in (0, 1] and
    u2 in [0, 1), multiples of 2^-24. Step 0 is the start of a chain, step i + 1 its i-th step.
    """
    seed = seed.to(device)
    blocks = (columns + 3) // 4
    row = torch.arange(first_row, first_row + rows, device=device)[:, None].expand(rows, blocks)
    block = torch.arange(blocks, device=device)[None, :].expand(rows, blocks)
    words = philox(seed, [block, row & _LOW, torch.full_like(row, step), row >> 32])
    real = torch.float32 if torch.device(device).type == "mps" else torch.float64
    z = []
    for first, second in ((words[0], words[1]), (words[2], words[3])):
        u1 = ((first >> 8) + 1).to(real) * 2.0**-24
        u2 = (second >> 8).to(real) * 2.0**-24
        radius = (-2 * u1.log()).sqrt()
        z += [radius * (2 * math.pi * u2).cos(), radius * (2 * math.pi * u2).sin()]
    return torch.stack(z, dim=-1).reshape(rows, blocks * 4)[:, :columns].to(dtype)
