"""Bundles side by side, from what each one's own files say; nothing is run, and nothing that was not measured is filled in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.bundle import Bundle
from compressor.errors import BundleError, ConfigError

__all__ = ["compare", "rows"]

Json = Mapping[str, Any]
ACCURACY = ("top1", "top1_ci95", "agreement", "n")


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """The ``vitrim compare --json`` object of two or more bundles, in the order given.

    Returns:
        ``bundles[{bundle, model, params, macs, evaluated_on, device, targets[{name, precision, size_bytes, latency_ms,
        estimated, device, top1, top1_ci95, agreement, n}]}], warnings``. A value that a bundle does not hold is null.

    Raises:
        ConfigError: fewer than two bundles.
        BundleError: one of them is damaged.
    """
    if len(paths) < 2:
        raise ConfigError(f"compare: at least two bundles must be given, got {len(paths)}.")
    found = [_facts(path) for path in paths]
    return {"bundles": found, "warnings": _warnings(found)}


def _facts(path: Path) -> dict[str, Any]:
    bundle = Bundle.open(path)
    report = _stored(bundle, "report.json")
    try:
        total, device = report.get("compressed", {}), _device(report.get("provenance", {}).get("device"))
        return {
            "bundle": str(path),
            "model": report.get("model") or bundle.manifest.checkpoint.get("name"),
            "params": int(total.get("params") or bundle.spec.params()),
            "macs": bundle.spec.macs(),
            "evaluated_on": total.get("evaluated_on"),
            "device": device,
            "targets": [_target(bundle, name, report, device) for name in bundle.manifest.targets],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{path}: report.json is not what `vitrim compress` writes: {error!r}.", hint="Make the bundle again."
        ) from None


def _target(bundle: Bundle, name: str, report: Json, device: Json | None) -> dict[str, Any]:
    """What the bundle knows of one target: raced when it was made, built later on a device, or modelled by a compiler."""
    entry = bundle.manifest.targets[name]
    raced: Json = next((t for t in report.get("targets", []) if t["name"] == name), {})
    modelled: Json = next((t for t in report.get("compiled", []) if t["name"] == name), {})
    engine = _stored(bundle, f"targets/{name}/build.json")
    source = engine or raced or modelled
    accuracy = raced.get("accuracy") or {}
    return {
        "name": name,
        "precision": entry.precision,
        "size_bytes": sum(bundle.manifest.files[file].size for file in set(entry.files)),
        "latency_ms": _latency(source.get("latency_ms")),
        "estimated": bool(modelled) and source is modelled,
        "device": _device(engine["device"]) if engine else device if raced else None,
        **{key: accuracy.get(key) for key in ACCURACY},
    }


def _latency(value: Any) -> dict[str, float] | None:
    """p50, p90 and p99 where measured; a compiler's estimate is one number."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: float(value[key]) for key in ("p50", "p90", "p99")}
    return {"p50": float(value)}


def _device(value: Json | None) -> dict[str, Any] | None:
    if not value:
        return None
    return {"id": str(value["id"]), "cpu": str(value.get("cpu", {}).get("model", "unknown"))}


def _stored(bundle: Bundle, name: str) -> Json:
    """A JSON object of the bundle, empty where it has none."""
    if name not in bundle.manifest.files:
        return {}
    try:
        content = json.loads((bundle.root / name).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{bundle.root}: {name} must be JSON, got {error}.", hint="Make the bundle again.") from None
    if not isinstance(content, dict):
        raise BundleError(f"{bundle.root}: {name} must be a JSON object, got {type(content).__name__}.")
    return content


def _warnings(found: Sequence[Json]) -> list[str]:
    """What must not be read off the table."""
    said = []
    for name in _names(found):
        there = {t["device"]["id"]: t["device"]["cpu"] for t in _every(found, name) if t["device"] is not None}
        if len(there) > 1:
            machines = ", ".join(f"{cpu} ({key})" for key, cpu in there.items())
            said.append(
                f"{name}: latencies were measured on different machines and do not compare: {machines}. "
                "Run them side by side: vitrim gate NEW --baseline OLD"
            )
        if len({t["estimated"] for t in _every(found, name) if t["latency_ms"]}) > 1:
            said.append(f"{name}: some latencies are a compiler's estimate, others were measured.")
    images = {(f["evaluated_on"], t["n"]) for f in found for t in f["targets"] if t["agreement"] is not None}
    if len(images) > 1:
        sets = ", ".join(sorted(f"{n} {kind}" for kind, n in images))
        said.append(f"Accuracies are of different images and do not compare: {sets}.")
    if len({f["model"] for f in found}) > 1:
        said.append("The bundles were made of different models: " + ", ".join(str(f["model"]) for f in found) + ".")
    return said


def _names(found: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(t["name"] for f in found for t in f["targets"]))


def _every(found: Sequence[Json], name: str) -> Iterable[Json]:
    return (t for f in found for t in f["targets"] if t["name"] == name)


# --------------------------------------------------------------------------- for people


def rows(found: Sequence[Json]) -> list[tuple[str, list[str]]]:
    """What is compared, line by line: a name and one cell per bundle, empty where a bundle does not know."""
    lines = [
        ("model", [str(f["model"]) for f in found]),
        ("parameters", [f"{f['params']:,}" for f in found]),
        ("MACs per image", [f"{f['macs']:,}" for f in found]),
    ]
    for name in _names(found):
        column = [next((t for t in f["targets"] if t["name"] == name), None) for f in found]
        cells = {key: [cell(t) if t else "" for t in column] for key, cell in CELLS.items()}
        lines += [(f"{name} {key}", values) for key, values in cells.items() if any(values)]
    return lines


def _ms(target: Json) -> str:
    ms = target["latency_ms"]
    return "" if ms is None else f"{ms['p50']:.3g}" + (" estimated" if target["estimated"] else "")


def _tail(target: Json) -> str:
    ms = target["latency_ms"]
    return f"{ms['p99']:.3g}" if ms is not None and "p99" in ms else ""


def _top1(target: Json) -> str:
    if target["top1"] is None:
        return ""
    low, high = target["top1_ci95"]
    return f"{target['top1']:.2f} % ({low:.1f} to {high:.1f})"


def _agreement(target: Json) -> str:
    return "" if target["agreement"] is None else f"{target['agreement']:.2f} %"


CELLS: Mapping[str, Callable[[Json], str]] = {
    "precision": lambda t: str(t["precision"]),
    "MB": lambda t: f"{t['size_bytes'] / 1e6:.2f}",
    "p50 ms": _ms,
    "p99 ms": _tail,
    "top-1": _top1,
    "same class as the original": _agreement,
}
