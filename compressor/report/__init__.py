"""A bundle's report.json as one self-contained HTML page. Pure: a dict in, text out.

What the report does not hold is left out of the page, never filled in. Every name comes from files that are not to be
trusted, so the template escapes everything; the charts escape for themselves.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from compressor.accounts import checked, modelled, placed
from compressor.errors import ConfigError, DataError
from compressor.intervals import paired_ratio, quantile_interval
from compressor.report import units
from compressor.report.charts import PERCENT, Curve, Point, curves, scatter
from compressor.report.page import page
from compressor.roofline import PARTS, fold
from compressor.types import Array, OpRecord

__all__ = ["contact_sheet", "render"]

Json = Mapping[str, Any]
CURVE_POINTS = 120  # an ECDF of thousands of samples is drawn by this many
OPS_SHOWN = 400
PRUNED = {"mlp": "MLP width", "qk": "Q/K width per head", "vo": "V width per head", "heads": "heads", "block": "block"}
IMAGE_PREFIX = "data:image/png;base64,"


def render(report: Json) -> str:
    """The HTML page of `report`, the content of a bundle's report.json.

    Args:
        report: the ``vitrim compress --json`` object and, where known, ``blocks``, ``candidates``, ``ops``,
        ``reference_ops``,
            ``sensitivity{rows, columns, values, unit}``, ``contact_sheet{image, caption}``, ``history`` and
            ``provenance``.

    Raises:
        DataError: the object does not have the shape that `compress` writes.
    """
    from markupsafe import Markup

    sections: dict[str, Callable[[Json], Any]] = {
        "headline": _headline,
        "targets": _targets,
        "compiled": _compiled,
        "plans": _plans,
        "front": lambda r: Markup(chart) if (chart := _front(r)) else None,  # compressor.report.charts escapes
        "searched": lambda r: bool(r.get("search")),
        "blocks": _blocks,
        "parts": _parts,
        "ecdf": lambda r: Markup(chart) if (chart := _ecdf(r)) else None,  # compressor.report.charts escapes
        "sensitivity": _sensitivity,
        "parity": _parity,
        "contact": _contact,
        "provenance": _provenance,
    }
    try:
        content = {name: section(report) for name, section in sections.items()}
        return page("report", model=str(report["model"]), legend=_legend(report), **content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"report: must be what `vitrim compress` writes: {what}.", hint="Make the bundle again."
        ) from error


def contact_sheet(images: Array, *, columns: int = 16, side: int = 48) -> str:
    """A data URI of one PNG with the images side by side, for ``contact_sheet.image``.

    Args:
        images: (n, H, W, C) uint8, C 1 or 3, n >= 1.
        columns: images per row.
        side: pixels of a cell.
    """
    from PIL import Image

    if images.ndim != 4 or len(images) == 0 or images.dtype != np.uint8:
        raise ConfigError(
            f"contact_sheet: images must be (n, H, W, C) uint8 and not none, got {images.dtype} {images.shape}."
        )
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * side, rows * side))
    for i, image in enumerate(images):
        cell = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB").resize((side, side))
        sheet.paste(cell, (i % columns * side, i // columns * side))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return IMAGE_PREFIX + base64.b64encode(data.getvalue()).decode()


# --------------------------------------------------------------------------- sections: report -> what the template
# shows, or None


def _headline(report: Json) -> dict[str, Any]:
    before, after = report["reference"], report["compressed"]
    cards = []
    best = max(report["targets"], key=lambda t: t["speedup"], default=None)
    if best is not None:
        old, new = best["reference_latency_ms"]["p50"], best["latency_ms"]["p50"]
        cards.append(
            _card(
                "Latency",
                units.ms(new),
                f"was {units.ms(old)}",
                f"{units.times(old / new)} on {best['name']}",
                _p50_note(report, best),
            )
        )
        size = best["size_bytes"]
        cards.append(_card("Artifact", units.size(size), f"{best['name']}, {best['precision']}", "", ""))
    cards.append(
        _card(
            "Parameters",
            units.count(after["params"]),
            f"was {units.count(before['params'])}",
            units.fewer(before, after, "params"),
            "",
        )
    )
    cards.append(
        _card(
            "Multiplies",
            units.count(after["macs"]),
            f"was {units.count(before['macs'])}",
            units.fewer(before, after, "macs"),
            "per image",
        )
    )
    if after.get("top1") is not None:
        low, high = after["top1_ci95"]
        drop = before["top1"] - after["top1"]
        change = f"{-drop:+.2f} points" if abs(drop) >= 0.005 else "unchanged"
        note = f"95 % interval {low:.2f} to {high:.2f}, {after.get('n', '?')} images"
        cards.append(_card("Top-1", f"{after['top1']:.2f} %", f"was {before['top1']:.2f} %", change, note))
    elif after.get("agreement") is not None:
        cards.append(
            _card("Agreement", f"{after['agreement']:.2f} %", "same class as the original", "", "images have no labels")
        )
    return {"cards": cards}


def _card(name: str, value: str, was: str, change: str, note: str) -> dict[str, str]:
    tone = "good" if "faster" in change or "fewer" in change else "plain"
    return {"name": name, "value": value, "was": was, "change": change, "note": note, "tone": tone}


def _targets(report: Json) -> list[dict[str, Any]]:
    longest = max((t["reference_latency_ms"]["p50"] for t in report["targets"]), default=1.0)
    longest = max([longest, *(t["latency_ms"]["p50"] for t in report["targets"])])
    rows = []
    for t in report["targets"]:
        old, new = t["reference_latency_ms"]["p50"], t["latency_ms"]["p50"]
        rows.append(
            {
                "name": t["name"],
                "precision": t["precision"],
                "size": units.size(t["size_bytes"]),
                "bars": [("before", units.ms(old), 100 * old / longest), ("after", units.ms(new), 100 * new / longest)],
                "speedup": units.times(old / new),
                "interval": _p50_note(report, t),
                "reverted": bool(t["reverted"]),
                "reason": " ".join(filter(None, (t.get("reason"), (t.get("pruning") or {}).get("sentence")))),
            }
        )
    return rows


def _compiled(report: Json) -> list[dict[str, Any]]:
    """Chips that are not here: what the vendor's compiler made of the network, and by which of the ways it was given."""
    return [
        {
            **{key: c[key] for key in ("name", "precision", "estimator", "leaves_out")},
            "size": units.size(c["size_bytes"]),
            "share": 100 * c["npu_mac_share"],
            "modelled": modelled(c, c["latency_ms"]),
            "placed": placed(c),
            "settings": sorted(c.get("settings", {}).items()),
        }
        for c in report.get("compiled", [])
    ]


def _plans(report: Json) -> list[tuple[str, str]]:
    return [(p["name"], f"a build plan{checked(p['checked'])}") for p in report.get("plans", [])]


def _front(report: Json) -> str | None:
    """Agreement over latency of every candidate tried; filled marks were kept."""
    series, points = _series(report), []
    for c in report.get("candidates", []):
        samples = np.asarray(c["samples_ns"], dtype=np.float64) / 1e6
        spread = (float(np.percentile(samples, 10)), float(np.percentile(samples, 90))) if samples.size else None
        label = f"{c['target']} {c['precision']}"
        points.append(
            Point(
                c["latency_ms"]["p50"],
                c["agreement"],
                label,
                series[c["target"]],
                filled=bool(c["kept"]),
                spread=spread,
            )
        )
    for p in report.get("search", {}).get("points", []):
        name = report["targets"][0]["name"]
        label = f"{name} {p['precision']}, {p['target_macs']:.0%} of the MACs"
        points.append(Point(p["latency_ms"], p["agreement"], label, series[name], filled=False))
    for t in report["targets"] if points else []:
        points.append(
            Point(t["reference_latency_ms"]["p50"], 100.0, f"{t['name']} original", series[t["name"]], filled=False)
        )
    return scatter(points, "latency p50, ms (line: p10 to p90)", "agreement, %", PERCENT) if points else None


def _blocks(report: Json) -> dict[str, Any] | None:
    """Widths of every block before and after, one column per part that was pruned, relative to the widest before."""
    records = report.get("blocks") or []
    columns = [part for part in PRUNED if any(r["part"] == part for r in records)]
    if not columns:
        return None
    widest = {part: max(r["before"] for r in records if r["part"] == part) for part in columns}
    rows: dict[int, dict[str, Any]] = {}
    for r in records:
        if r["part"] not in widest:
            continue
        measured = r.get("measured")
        rows.setdefault(int(r["block"]), {})[r["part"]] = {
            "before": r["before"],
            "after": r["after"],
            "outer": 100 * r["before"] / widest[r["part"]],
            "inner": 100 * r["after"] / r["before"],
            "error": f"{r['predicted'] if measured is None else measured:.2g}",
            "fallback": r.get("fallback") or "",
        }
    return {"columns": [(part, PRUNED[part]) for part in columns], "rows": sorted(rows.items())}


def _parts(report: Json) -> list[dict[str, Any]] | None:
    """Time per part of the network on every target that reports its nodes, and before where that was recorded."""
    found = []
    for t in report["targets"]:
        records = t.get("ops") or report.get("ops", {}).get(t["name"]) or []
        if not records:
            continue
        after = _by_part(records)
        before = _by_part(report.get("reference_ops", {}).get(t["name"]) or [])
        longest = max([*after.values(), *before.values()], default=0.0) or 1.0
        rows = [
            {
                "part": part,
                "after": after.get(part, 0.0),
                "before": before.get(part),
                "after_width": 100 * after.get(part, 0.0) / longest,
                "before_width": 100 * before.get(part, 0.0) / longest,
                "share": 100 * after.get(part, 0.0) / (sum(after.values()) or 1.0),
            }
            for part in PARTS
            if part in after or part in before
        ]
        slowest = sorted(records, key=lambda op: -op["time_ms"])[:OPS_SHOWN]
        found.append(
            {
                "target": t["name"],
                "rows": rows,
                "ops": [op for op in slowest if op["time_ms"] > 0],
                "total": sum(after.values()),
            }
        )
    return found or None


def _by_part(records: Sequence[Json]) -> dict[str, float]:
    keys = ("name", "type", "placement", "precision", "time_ms")
    sums: dict[str, float] = {}
    for part in fold([OpRecord(**{key: op[key] for key in keys}) for op in records]):
        sums[part.part] = sums.get(part.part, 0.0) + part.time_ms
    return sums


def _ecdf(report: Json) -> str | None:
    """Share of inferences finished within a time, for every candidate; candidates not kept are dashed."""
    series, lines = _series(report), []
    for c in report.get("candidates", []):
        samples = np.sort(np.asarray(c["samples_ns"], dtype=np.float64)) / 1e6
        if samples.size < 2:
            continue
        shares = np.linspace(0.0, 0.95, CURVE_POINTS)  # The last ones are outliers that would squeeze the rest
        label = f"{c['target']} {c['precision']}"
        lines.append(
            Curve(
                np.quantile(samples, shares).tolist(), shares.tolist(), label, series[c["target"]], dashed=not c["kept"]
            )
        )
    return curves(lines, "latency, ms (to p95)", "share of inferences") if lines else None


def _sensitivity(report: Json) -> dict[str, Any] | None:
    """Heat map: colour strength by the rank of the value, so that one outlier does not hide the rest."""
    table = report.get("sensitivity")
    if not table:
        return None
    values = np.asarray(table["values"], dtype=np.float64)
    ranks = np.argsort(np.argsort(values.ravel())).reshape(values.shape) / max(1, values.size - 1)
    rows = [
        {"name": name, "cells": [(f"{v:.2g}", round(100 * float(r))) for v, r in zip(line, rank, strict=True)]}
        for name, line, rank in zip(table["rows"], values, ranks, strict=True)
    ]
    return {"columns": list(table["columns"]), "rows": rows, "unit": table.get("unit", "")}


def _parity(report: Json) -> list[dict[str, Any]] | None:
    rows = [
        {"name": t["name"], "precision": t["precision"], **t["parity"]}
        for t in [*report["targets"], *report.get("compiled", [])]
        if t.get("parity")
    ]
    return rows or None


def _contact(report: Json) -> dict[str, str] | None:
    sheet = report.get("contact_sheet")
    if not sheet:
        return None
    if not str(sheet["image"]).startswith(IMAGE_PREFIX):  # Anything else could make the page fetch or run something
        raise ValueError("contact_sheet.image must be an embedded PNG")
    return {"image": sheet["image"], "caption": sheet.get("caption", "")}


def _provenance(report: Json) -> list[tuple[str, str]]:
    rows = []
    for key, value in report.get("provenance", {}).items():
        if isinstance(value, Mapping) and not any(isinstance(v, Mapping | list) for v in value.values()):
            rows.append((key, ", ".join(f"{k} {v}" for k, v in value.items())))
        else:
            rows.append(
                (key, json.dumps(value, indent=1, sort_keys=True) if isinstance(value, Mapping | list) else str(value))
            )
    timings = report.get("timings_s") or {}
    if timings:
        rows.append(("time taken", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timings.items())))
    return rows


# --------------------------------------------------------------------------- small things


def _series(report: Json) -> dict[str, int]:
    """Colour of every target, the same in every chart."""
    return {t["name"]: i for i, t in enumerate(report["targets"])}


def _legend(report: Json) -> list[tuple[str, int]]:
    return [(name, i % 6) for name, i in _series(report).items()]


def _p50_note(report: Json, target: Json) -> str:
    """Interval of the speed-up where both sides' samples are there, else of the median, else nothing."""
    kept = [c for c in report.get("candidates", []) if c["target"] == target["name"] and c["kept"]]
    if not kept or len(kept[0]["samples_ns"]) < 6:
        return ""
    samples, reference = kept[0]["samples_ns"], target.get("reference_samples_ns")
    if reference and len(reference) == len(samples):
        ratio = paired_ratio(reference, samples)
        return f"{ratio.ratio:.2f}x, 95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    low, high = quantile_interval(samples, 0.5)
    return f"p50 95 % interval {units.ms(low / 1e6)} to {units.ms(high / 1e6)}"
