"""What to do, as data: one frozen record, from YAML at the edge. Unknown key = error; command-line flags override it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from compressor.errors import ConfigError, unknown_name
from compressor.types import Precision

__all__ = ["Recipe", "from_yaml", "override", "to_dict"]

RATIOS = ("mlp_ratio", "qk_ratio", "vo_ratio", "head_ratio")
INTEGERS: Mapping[str, tuple[int, float]] = {  # and the least and the most allowed
    "calib_size": (1, math.inf),
    "threads": (1, 256),  # more only make a machine thrash
    "seed": (0, math.inf),
    "image_size": (1, math.inf),
    "drop_blocks": (0, math.inf),
}
CHOICES = {
    "pruner": ("corp", "obs"),
    "precision": (*get_args(Precision), "auto"),
    "quantizer": ("vitrim", "nncf"),
    "importance": ("output", "entropy"),
    "select": ("random", "k_centre", "coarse_to_fine"),
}


@dataclass(frozen=True)
class Recipe:
    """Every choice of one `vitrim compress` run; the YAML keys are these names.

    Ratios are the fraction removed, in [0, 1). `precision` ``auto`` lets each target's measured latency decide.
    """

    model: str = ""
    data: str = "demo"
    targets: tuple[str, ...] = ("ort",)
    eval: str | None = None
    arch: str | None = None
    image_size: int | None = None
    pruner: Literal["corp", "obs"] = "obs"
    mlp_ratio: float = 0.0
    qk_ratio: float = 0.0
    vo_ratio: float = 0.0
    head_ratio: float = 0.0
    drop_blocks: int = 0
    importance: Literal["output", "entropy"] = "output"
    target_macs: float | None = None
    target_params: float | None = None
    damping: float | Literal["auto"] = "auto"
    precision: str = "auto"
    quantizer: Literal["vitrim", "nncf"] = "vitrim"
    min_agreement: float = 98.0
    calib_size: int = 512
    select: Literal["random", "k_centre", "coarse_to_fine"] = "random"
    match: str | None = None
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        self._check_shares()
        for name, (low, high) in INTEGERS.items():
            value = getattr(self, name)
            if value is None and name == "image_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                rule = f"of at least {low}" if high == math.inf else f"of {low} to {high}"
                raise ConfigError(f"{name} must be an integer {rule}, got {value!r}.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        if self.damping != "auto" and not (number and 0 < self.damping < math.inf):
            raise ConfigError(f"damping must be auto or a positive number, got {self.damping!r}.")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"targets must be at least one name, each once, got {list(self.targets)}.")
        self._check_together()

    def _check_shares(self) -> None:
        for name in RATIOS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
                raise ConfigError(
                    f"{name} must be in [0, 1), got {value!r}.", hint="It is the fraction removed; 0.5 removes half."
                )
        for name in ("target_macs", "target_params"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(
                    f"{name} must be in (0, 1), got {value!r}.", hint="It is the share kept; 0.5 keeps half."
                )
        if not isinstance(self.min_agreement, int | float) or not 0 <= self.min_agreement <= 100:
            raise ConfigError(f"min_agreement must be a percentage in [0, 100], got {self.min_agreement!r}.")

    def _check_together(self) -> None:
        """What one choice says of another."""
        if self.pruner == "corp" and self.vo_ratio > 0:
            raise ConfigError(
                "vo_ratio must be 0 with pruner 'corp', which leaves values alone.", hint="Use --pruner obs."
            )
        if self.match is not None and self.select != "random":
            raise ConfigError(
                f"select must not be given with match, which chooses the calibration images itself, got {self.select!r}.",
                hint="Leave out --select or --match.",
            )

    @property
    def prunes(self) -> bool:
        """Whether anything is removed at all."""
        budget = self.target_macs is not None or self.target_params is not None
        return budget or self.drop_blocks > 0 or any(getattr(self, name) > 0 for name in RATIOS)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as YAML or JSON would hold them."""
    return {**asdict(recipe), "targets": list(recipe.targets)}


def override(recipe: Recipe, flags: Mapping[str, Any]) -> Recipe:
    """`recipe` with every flag that was given (is not None) put over it."""
    given = {k: v for k, v in flags.items() if v is not None}
    return replace(recipe, **given)


def from_yaml(path: Path) -> Recipe:
    """The recipe in a YAML file: a mapping of `Recipe` fields plus an optional ``schema: 1``.

    Raises:
        ConfigError: unreadable, not a mapping, an unknown key (the nearest known one is named), or a value out of range.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: recipe must be a readable YAML file, got {str(error).splitlines()[0]}.") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: recipe must be a mapping of options, got {type(content).__name__}.",
            hint="For example: `mlp_ratio: 0.5`.",
        )
    if content.pop("schema", 1) != 1:
        raise ConfigError(f"{path}: schema must be 1.", hint="This vitrim reads recipes of schema 1.")
    known = [f.name for f in fields(Recipe)]
    for name in content:
        if name not in known:
            raise unknown_name(f"{path}: recipe key", str(name), known)
    named = content.get("targets", ["ort"])
    targets = [named] if isinstance(named, str) else named
    if not isinstance(targets, list):
        raise ConfigError(f"{path}: targets must be a name or a list of names, got {named!r}.")
    content["targets"] = tuple(targets)
    for name, kind in get_type_hints(Recipe).items():
        try:
            TypeAdapter(kind).validate_python(content.get(name, getattr(Recipe, name)), strict=True)
        except ValidationError as error:
            rule = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise ConfigError(f"{path}: {name} {rule}, got {content[name]!r}.") from None
    return Recipe(**content)
