"""Saving an environment in mid-episode, and putting it back.

Gymnasium has no call for this, so the attributes of the environment and of its wrappers are saved:
numbers, strings, containers, arrays and random generators as plain data, MuJoCo's simulation
through MuJoCo. Nothing is pickled, so a checkpoint can't run code. An attribute of any other type
may hold state that would be lost: then the environment counts as not restorable, by name of that
attribute, rather than be put back half.

An environment or wrapper of another kind can join in by defining ``state_dict()``, returning plain
data and arrays, and ``load_state_dict(state)``.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec

_CONSTANT_ATTRIBUTES = {
    "env",  # the wrapped environment, which is saved in its own turn
    "_saved_kwargs",  # what a wrapper and an environment were constructed with
    "_ezpickle_args",
    "_ezpickle_kwargs",
    "spec",
    "_cached_spec",  # filled when somebody asks for it
}
_CONSTANT_TYPES = (
    EnvSpec,
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    np.dtype,
)
_TAG = "__diffcore__"


class NotRestorableError(Exception):
    """The environment holds state that can't be saved; the message says where."""


def save_environment(env: gym.Env[Any, Any]) -> dict[str, Any]:
    """The state of ``env`` and of all its wrappers, as plain data and tensors.

    Raises:
        NotRestorableError: if something in it can't be saved.
    """
    encoder = _Encoder()
    layers = []
    for layer in _layers(env):
        if hasattr(layer, "state_dict") and hasattr(layer, "load_state_dict"):
            with _own_errors_named(layer):
                own = layer.state_dict()
            state = {"own": encoder.encode(own, f"{type(layer).__name__}.state_dict()")}
            # Most such environments draw from Gymnasium's generator without thinking of it.
            state["np_random"] = encoder.encode(getattr(layer, "_np_random", None), "_np_random")
        else:
            state = {"attributes": encoder.encode_attributes(layer)}
        layers.append({"type": _type_name(layer), **state})
    return {"layers": layers}


def restore_environment(env: gym.Env[Any, Any], state: dict[str, Any]) -> None:
    """Put ``env``, made and reset like the saved one, into a saved state.

    Raises:
        NotRestorableError: if it isn't the same kind of environment, or doesn't take the state.
    """
    layers = _layers(env)
    ours, saved = [_type_name(layer) for layer in layers], [s["type"] for s in state["layers"]]
    if ours != saved:
        raise NotRestorableError(f"it was saved as {' of '.join(saved)}, now {' of '.join(ours)}")
    decoder = _Decoder()
    for layer, layer_state in zip(layers, state["layers"], strict=True):
        if "own" in layer_state:
            own = decoder.decode(layer_state["own"])
            with _own_errors_named(layer):
                layer.load_state_dict(own)
            np_random = decoder.decode(layer_state["np_random"])
            if not isinstance(layer, gym.Wrapper):  # whose generator is that of what it wraps
                layer._np_random = np_random
        else:
            decoder.restore_attributes(layer, layer_state["attributes"])
    if not _equal(save_environment(env), state):
        raise NotRestorableError("it isn't in the saved state after restoring")


def _layers(env: gym.Env[Any, Any]) -> list[Any]:
    """The wrappers from the outermost inwards, then the environment itself."""
    layers: list[Any] = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    return layers


@contextmanager
def _own_errors_named(layer: object) -> Iterator[None]:
    """A fault in an environment's own saving needn't end a training run."""
    try:
        yield
    except Exception as error:
        name = type(layer).__name__
        raise NotRestorableError(f"{name}'s own saving or loading failed: {error!r}") from error


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _Encoder:
    """Turns values into plain data. Objects met twice are saved once, so that sharing survives."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # id of an object -> its number
        self._alive: list[object] = []  # keeps ids from being used again
        self._memory_owner: dict[int, int] = {}  # id of an array's memory -> id of the array

    def encode_attributes(self, owner: Any) -> dict[str, Any]:
        attributes = {}
        for name, value in vars(owner).items():
            if name in _CONSTANT_ATTRIBUTES or _is_constant(value):
                continue
            attributes[name] = self.encode(value, f"{type(owner).__name__}.{name}")
        return attributes

    def encode(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        if isinstance(value, np.generic):
            self._check_dtype(value.dtype, where)
            return {_TAG: "scalar", "value": torch.from_numpy(np.array(value))}
        if type(value) is tuple:
            return {_TAG: "tuple", "items": [self.encode(item, where) for item in value]}
        if id(value) in self._numbers:
            return {_TAG: "same", "number": self._numbers[id(value)]}
        number = len(self._numbers)
        self._numbers[id(value)] = number
        self._alive.append(value)
        return {_TAG: _kind(value, where), "number": number, **self._contents(value, where)}

    def _contents(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, np.ndarray):
            self._check_dtype(value.dtype, where)
            self._check_memory(value, where)
            return {"value": torch.from_numpy(value.copy())}
        if isinstance(value, dict):
            return {"items": [[self.encode(x, where) for x in pair] for pair in value.items()]}
        if isinstance(value, set):
            # In a fixed order, so that equal states are saved alike.
            return {"items": [self.encode(item, where) for item in sorted(value, key=repr)]}
        if isinstance(value, deque):
            items = [self.encode(item, where) for item in value]
            return {"items": items, "maxlen": value.maxlen}
        if isinstance(value, list):
            return {"items": [self.encode(item, where) for item in value]}
        if isinstance(value, np.random.Generator):
            state = self.encode(value.bit_generator.state, where)
            return {"bit_generator": type(value.bit_generator).__name__, "state": state}
        if isinstance(value, np.random.RandomState):
            return {"state": self.encode(value.get_state(), where)}
        if isinstance(value, random.Random):
            return {"state": self.encode(value.getstate(), where)}
        if isinstance(value, gym.Space):
            # A space is constant but for the generator that sample() draws from.
            return {"np_random": self.encode(value._np_random, where)}
        return _mujoco_state(value)

    def _check_dtype(self, dtype: np.dtype[Any], where: str) -> None:
        if dtype.kind not in "biufc" or dtype.itemsize > 16 or dtype == np.longdouble:
            raise NotRestorableError(f"{where} holds an array of dtype {dtype}")

    def _check_memory(self, array: Any, where: str) -> None:
        """Two arrays over the same memory would come back as two that no longer are."""
        owner = array
        while isinstance(owner, np.ndarray) and owner.base is not None:
            owner = owner.base
        if not isinstance(owner, (np.ndarray, bytes)):
            raise NotRestorableError(f"{where} is an array over memory of {_type_name(owner)}")
        self._alive.append(owner)
        if self._memory_owner.setdefault(id(owner), id(array)) != id(array):
            raise NotRestorableError(f"{where} shares its memory with another array")


class _Decoder:
    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}

    def restore_attributes(self, owner: Any, attributes: dict[str, Any]) -> None:
        for name, saved in attributes.items():
            setattr(owner, name, self.decode(saved, current=getattr(owner, name, None)))

    def decode(self, saved: Any, current: Any = None) -> Any:
        """``current`` is what the restored object replaces; some are changed in place."""
        if not isinstance(saved, dict):
            return saved
        kind = saved[_TAG]
        if kind == "scalar":
            return saved["value"].numpy()[()]
        if kind == "tuple":
            return tuple(self.decode(item) for item in saved["items"])
        if kind == "same":
            return self._objects[saved["number"]]
        value = self._make(kind, saved, current)
        self._objects[saved["number"]] = value
        self._fill(value, kind, saved)
        return value

    def _make(self, kind: str, saved: dict[str, Any], current: Any) -> Any:
        """The object without its contents, so that contents may refer back to it."""
        if kind == "array":
            return saved["value"].numpy().copy()
        if kind == "generator":
            return np.random.Generator(getattr(np.random, saved["bit_generator"])())
        if kind == "deque":
            return deque(maxlen=saved["maxlen"])
        if kind in ("space", "mujoco_model", "mujoco_data"):
            return current
        empty = {
            "dict": dict,
            "list": list,
            "set": set,
            "random_state": np.random.RandomState,
            "python_random": random.Random,
        }
        return empty[kind]()

    def _fill(self, value: Any, kind: str, saved: dict[str, Any]) -> None:
        if kind == "dict":
            value.update({self.decode(k): self.decode(v) for k, v in saved["items"]})
        elif kind in ("list", "deque"):
            value.extend(self.decode(item) for item in saved["items"])
        elif kind == "set":
            value.update(self.decode(item) for item in saved["items"])
        elif kind == "generator":
            value.bit_generator.state = self.decode(saved["state"])
        elif kind == "random_state":
            value.set_state(self.decode(saved["state"]))
        elif kind == "python_random":
            value.setstate(self.decode(saved["state"]))
        elif kind == "space":
            value._np_random = self.decode(saved["np_random"])
        elif kind == "mujoco_data":
            _restore_mujoco_data(value, saved)


def _is_constant(value: object) -> bool:
    if isinstance(value, MethodType):
        return isinstance(value.__self__, gym.Env)
    return isinstance(value, _CONSTANT_TYPES) or _type_name(value) == (
        "gymnasium.envs.mujoco.mujoco_rendering.MujocoRenderer"
    )


def _kind(value: object, where: str) -> str:
    if isinstance(value, np.ndarray) and type(value) is np.ndarray:
        return "array"
    if isinstance(value, gym.Space):
        return "space"
    exact = {
        dict: "dict",
        list: "list",
        set: "set",
        deque: "deque",
        np.random.Generator: "generator",
        np.random.RandomState: "random_state",
        random.Random: "python_random",
    }
    if type(value) in exact:
        return exact[type(value)]
    if type(value).__module__.startswith("mujoco.") and type(value).__name__ == "MjModel":
        return "mujoco_model"
    if type(value).__module__.startswith("mujoco.") and type(value).__name__ == "MjData":
        return "mujoco_data"
    raise NotRestorableError(f"{where} is a {_type_name(value)}, which can't be saved")


def _mujoco_state(value: Any) -> dict[str, Any]:
    """What to save of a MuJoCo model or of its data."""
    import mujoco

    if isinstance(value, mujoco.MjModel):
        # Some environments change the model. It isn't saved, only checked to be the same.
        buffer = np.empty(mujoco.mj_sizeModel(value), dtype=np.uint8)
        mujoco.mj_saveModel(value, None, buffer)
        return {"sha256": hashlib.sha256(buffer.tobytes()).hexdigest()}
    specification = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    integration = np.empty(mujoco.mj_stateSize(value.model, specification))
    mujoco.mj_getState(value.model, value, integration, specification)
    return {
        "integration": torch.from_numpy(integration),
        "derived": {
            name: torch.from_numpy(array.copy()) for name, array in _derived_arrays(value).items()
        },
    }


def _restore_mujoco_data(data: Any, saved: dict[str, Any]) -> None:
    import mujoco

    specification = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    if mujoco.mj_stateSize(data.model, specification) != len(saved["integration"]):
        raise NotRestorableError("its MuJoCo model has another size")
    integration = saved["integration"].numpy()
    mujoco.mj_setState(data.model, data, integration, specification)
    mujoco.mj_forward(data.model, data)
    # mj_forward changes the warm start of the solver.
    mujoco.mj_setState(data.model, data, integration, specification)
    arrays = _derived_arrays(data)
    for name, values in saved["derived"].items():
        arrays[name][...] = values.numpy()


def _derived_arrays(data: Any) -> dict[str, Any]:
    """What the simulation derived from its state, as environments read it before their next step.

    After mj_step these belong to the last substep's start, so mj_forward wouldn't give them back.
    Left out are the solver's arrays, whose sizes change with the contacts: a step computes them
    anew before using them.
    """
    solver = ("efc_", "iefc_", "efm_", "island", "map_", "iacc", "ifrc_")
    return {
        name: array
        for name in dir(data)
        if not name.startswith(("_", *solver))
        and isinstance(array := getattr(data, name), np.ndarray)
        and array.dtype == np.float64
        and array.size > 0
    }


def _equal(a: Any, b: Any) -> bool:
    """Whether two saved states are the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))
