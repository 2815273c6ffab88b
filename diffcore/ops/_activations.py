"""The activations that networks here may use, with the derivative each needs on the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    #: (gradient at the output, input) -> gradient at the input
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda z: z, lambda g, z: g),
    "relu": Activation(F.relu, lambda g, z: aten.threshold_backward(g, z, 0)),
    "elu": Activation(F.elu, lambda g, z: aten.elu_backward(g, 1.0, 1, 1, False, z)),
    "silu": Activation(F.silu, aten.silu_backward),
    "gelu": Activation(F.gelu, aten.gelu_backward),
    "mish": Activation(F.mish, aten.mish_backward),
    "tanh": Activation(torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z))),
    "sin": Activation(torch.sin, lambda g, z: g * torch.cos(z)),
    "cos": Activation(torch.cos, lambda g, z: -g * torch.sin(z)),
}
