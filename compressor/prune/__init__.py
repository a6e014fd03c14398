"""One-shot structured pruning: calibration images in, a smaller model and a report per block out. No labels needed.

Layering: a pruner sees the model and a way to pass over preprocessed images again. Collecting statistics belongs to
`calibration`, a sibling, so its `observe` is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from compressor.errors import ConfigError, unknown_name
from compressor.prune import corp, obs
from compressor.prune.corp import CorpConfig
from compressor.prune.measure import stream_errors
from compressor.prune.obs import ObsConfig
from compressor.prune.records import BlockReport, Pruned
from compressor.types import Array, Model, Statistics
from compressor.vit import VisionTransformer, to_torch

__all__ = ["PRUNERS", "Batches", "BlockReport", "CorpConfig", "ObsConfig", "Observe", "Pruned", "configure", "prune"]

Batches = Callable[[], Iterable[Array]]  # a fresh pass over the calibration images: float32 (B, C, h, w)
Observe = Callable[[VisionTransformer, Iterable[Array]], Statistics]
Device = torch.device | str


def _corp(model: Model, batches: Batches, config: CorpConfig, observe: Observe, device: Device) -> Pruned:
    dense = to_torch(model, device)
    result = corp.prune(model, observe(dense, batches()), config)
    errors = stream_errors(dense, to_torch(result.model, device), batches())
    branch = {"mlp": "mlp", "qk": "attn"}
    blocks = (replace(b, measured=errors[f"blocks.{b.block}.{branch[b.part]}"]) for b in result.blocks)
    return replace(result, blocks=tuple(blocks))


def _obs(model: Model, batches: Batches, config: ObsConfig, observe: Observe, device: Device) -> Pruned:
    del observe  # Unused: its sums are of the compressed stream, taken block by block
    return obs.prune(model, batches, config, device)


# --pruner name -> its configuration and how it is run
PRUNERS: Mapping[str, tuple[type[Any], Callable[..., Pruned]]] = {"corp": (CorpConfig, _corp), "obs": (ObsConfig, _obs)}


def configure(pruner: str, options: Mapping[str, Any]) -> CorpConfig | ObsConfig:
    """The configuration of `pruner` from options by name; what is 0 or None is not asked for.

    ``target_macs`` and ``target_params`` are the shares of `ObsConfig.target`.

    Raises:
        ConfigError: an unknown pruner, a value out of range, or an option this pruner does not have.
    """
    if pruner not in PRUNERS:
        raise unknown_name("pruner", pruner, PRUNERS)
    kind, _ = PRUNERS[pruner]
    asked = {name: value for name, value in options.items() if value not in (0, None)}
    targets = [(t, asked.pop(f"target_{t}")) for t in ("macs", "params") if f"target_{t}" in asked]
    if len(targets) > 1:
        raise ConfigError("target_macs and target_params must not be combined.", hint="Give one of them.")
    if targets:
        asked["target"] = targets[0]
    known = {f.name for f in fields(kind)}
    for name in asked.keys() - known:
        others = [other for other, (config, _) in PRUNERS.items() if name in {f.name for f in fields(config)}]
        hint = f"Use --pruner {others[0]}." if others else ""
        raise ConfigError(
            f"pruner {pruner!r} must not be given {name}, got {asked[name]}: it has no such step.", hint=hint
        )
    return kind(**asked)  # type: ignore[no-any-return]


def prune(
    model: Model, batches: Batches, config: CorpConfig | ObsConfig, observe: Observe, device: Device = "cpu"
) -> Pruned:
    """`model` made smaller as `config` says, with the weights that stay absorbing what was removed.

    Args:
        model: canonical model; not changed.
        batches: called for every pass that is needed over the calibration images.
        config: from `configure`; its type chooses the pruner.
        observe: ``calibration.observe.observe`` with its plan, moments at fc2, q and k at least.
        device: where passes and linear algebra run.
    """
    run = next(run for kind, run in PRUNERS.values() if isinstance(config, kind))
    return run(model, batches, config, observe, device)
