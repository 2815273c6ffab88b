"""From an environment's id to the task that an agent's table of hyper-parameters knows."""

from __future__ import annotations

import re

_PREFIX = re.compile(r"^.*[:/]")  # a module and a namespace
_SUFFIXES = re.compile(r"(-ET|-MBBL|-masked)*(-v\d+)?$")  # variants of a task, and its version
_SAME_TASK = {"Walker": "Walker2d", "SlimHumanoid": "Humanoid"}


def environment_base_name(env_id: str) -> str:
    """The Gymnasium task that ``env_id`` is a version or a variant of, by its bare name.

    Left out are the module, the namespace, the version, and the suffixes by which
    :mod:`diffcore.envs` names variants. A robot that goes by another name there gets Gymnasium's.
    Agents look up their defaults under this name, so a variant has its base task's.

    >>> environment_base_name("HalfCheetah-v5")
    'HalfCheetah'
    >>> environment_base_name("diffcore/Walker-ET-masked-v0")
    'Walker2d'
    """
    name = _SUFFIXES.sub("", _PREFIX.sub("", env_id), count=1)
    return _SAME_TASK.get(name, name)
