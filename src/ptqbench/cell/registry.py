"""The members of the four roles by name. A member is imported on first use.

Adding a member is one line in ``MEMBERS``: name -> ``"module:attribute"``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from ptqbench.cell.spec import Role, RoleSpec, build, left_at_default, nearest, to_dict
from ptqbench.errors import ConfigError

MEMBERS: dict[Role, dict[str, str]] = {
    "transform": {
        "none": "ptqbench.methods.transforms:NoTransform",
        "hadamard": "ptqbench.methods.transforms:Hadamard",
        "block_hadamard": "ptqbench.methods.block_hadamard:BlockHadamard",
        "subspace": "ptqbench.methods.subspace:Subspace",
        "smoothquant": "ptqbench.methods.smoothquant:SmoothQuant",
        "awq": "ptqbench.methods.awq:Awq",
        "learned_rotation": "ptqbench.methods.learned:LearnedRotation",
    },
    "target": {
        "weight": "ptqbench.methods.targets:Weight",
        "loaq": "ptqbench.methods.targets:Loaq",
        "qep": "ptqbench.methods.targets:Qep",
    },
    "solver": {
        "none": "ptqbench.methods.solvers:NoSolver",
        "rtn": "ptqbench.methods.solvers:RoundToNearest",
        "gptq": "ptqbench.methods.solvers:Gptq",
        "gptaq": "ptqbench.methods.solvers:Gptaq",
        "qronos": "ptqbench.methods.solvers:Qronos",
    },
    "refine": {
        "none": "ptqbench.methods.refinements:NoRefinement",
        "null_space": "ptqbench.methods.refinements:NullSpace",
        "scale_refit": "ptqbench.methods.refinements:ScaleRefit",
    },
}


def member_class(role: Role, name: str) -> Any:
    """Import the dataclass that is registered under a name (a ``methods.base.Member``).

    Raises:
        ConfigError: The name is not registered for this role; the message lists the known names.
    """
    known = MEMBERS[role]
    if name not in known:
        raise ConfigError(f"unknown method.{role} {name!r}; {nearest(name, known)}")
    module, attribute = known[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def create(role: Role, spec: RoleSpec) -> Any:
    """Build the frozen member that a role specification names, and validate its hyper-parameters strictly."""
    return build(member_class(role, spec.name), {**spec.options, **spec.files}, f"method.{role}")


def file_options(role: Role, name: str) -> dict[str, str]:
    """Map the options of a member that name a file to the options that hold the digest of its content."""
    return dict(member_class(role, name).FILES)


def complete(role: Role, options: Mapping[str, Any]) -> RoleSpec:
    """Turn ``{name: gptq, damping: 0.01}`` into a role specification with every default written out.

    Raises:
        ConfigError: No name, an unknown name, or a hyper-parameter that the member does not have or does not accept.
    """
    given = dict(options)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"method.{role}: expected a mapping with a name, got {dict(options)!r}; {nearest('', MEMBERS[role])}"
        )
    member: Any = build(member_class(role, name), given, f"method.{role}")
    kept: dict[str, Any] = to_dict(member)
    for field in dataclasses.fields(member):
        if left_at_default(field, getattr(member, field.name)):
            del kept[field.name]
    return RoleSpec(name=name, options=kept)
