"""What a person sees of a result: short tables of the JSON that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressor.accounts import checked, modelled, placed

__all__ = ["accuracy", "compared", "compressed", "estimated", "model", "placement", "profile", "searched"]

Json = Mapping[str, Any]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    from rich.table import Table
    from rich.text import Text  # names come from files: shown, never read as markup

    table = Table(title=Text(title), title_justify="left", title_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _share(part: float, whole: float) -> str:
    return f"{part:,} ({part / whole:.0%})"


def _percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.2f} %" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def model(facts: Json) -> list[Any]:
    """`inspect`."""
    head = f"{facts['name'] or facts['family']} ({facts['family']}): {facts['params']:,} parameters, {facts['macs']:,} MACs"
    rows: list[list[object]] = []
    for i, b in enumerate(facts["blocks"]):
        sizes = [b["heads"], b["qk_dim"], b["v_dim"], b["mlp_dim"]]
        if rows and rows[-1][1:] == sizes:
            rows[-1][0] = f"{str(rows[-1][0]).split('-', maxsplit=1)[0]}-{i}"
        else:
            rows.append([i, *sizes])
    p = facts["preprocess"]
    images = f"Images: {p['size'][0]}x{p['size'][1]} {p['channels']}, {p['interpolation']}, crop {p['crop']}"
    return [
        head,
        f"Width {facts['embed_dim']}, {len(facts['blocks'])} blocks",
        _table("", ["blocks", "heads", "qk", "v", "mlp"], rows),
        f"{images}, mean {p['mean']}, std {p['std']}",
    ]


def placement(found: Json) -> list[Any]:
    """`inspect --target`: what stays off the accelerator, and the widths it pads."""
    where = f"{found['target']}{' ' + found['chip'] if found['chip'] else ''}"
    if not found["unsupported"]:
        lines: list[Any] = [
            f"{where}: nothing known keeps any of the {found['operations']} operations off the accelerator"
        ]
    else:
        alike: dict[tuple[str, str, str], list[str]] = {}
        for f in found["unsupported"]:
            alike.setdefault((f["op"], f["reason"], f["source"]), []).append(f["name"])
        rows = [[op, len(names), names[0], reason, source] for (op, reason, source), names in alike.items()]
        told = len(found["unsupported"])
        title = f"{where}: {told} of {found['operations']} operations will not run on the accelerator"
        lines = [_table(title, ["operation", "times", "first", "reason", "source"], rows)]
    if found["widths"]:
        rows = [[w["name"], w["width"], w["padded"]] for w in found["widths"]]
        lines.append(
            _table(f"Widths padded to multiples of {found['widths'][0]['multiple']}", ["", "width", "as"], rows)
        )
    return lines


def compressed(result: Json) -> list[Any]:
    """`compress`."""
    before, after = result["reference"], result["compressed"]
    size = [
        ["parameters", f"{before['params']:,}", _share(after["params"], before["params"])],
        ["MACs per image", f"{before['macs']:,}", _share(after["macs"], before["macs"])],
        ["top-1", _percent(before["top1"], before["top1_ci95"]), _percent(after["top1"], after["top1_ci95"])],
        ["same class as before", "", f"{_percent(after['agreement'])} of {after['n']} {after['evaluated_on']} images"],
    ]
    rows = [
        [
            t["name"],
            t["precision"],
            f"{t['reference_latency_ms']['p50']:.3g}",
            f"{t['latency_ms']['p50']:.3g}",
            f"{t['speedup']:.2f}x",
            f"{t['size_bytes'] / 1e6:.2f}",
            "" if t["int8_mac_share"] is None else f"{t['int8_mac_share']:.0%}",
            _percent(t["accuracy"]["top1"]),
        ]
        for t in result["targets"]
    ]
    columns = ["target", "kept", "before ms", "after ms", "speed-up", "MB", "int8 MACs", "top-1"]
    lines: list[Any] = [_table(f"{result['model']}", ["", "before", "after"], size), _table("Targets", columns, rows)]
    for t in result["targets"]:
        lines.append(f"{t['name']}: {t['reason']}")
        if t["kept_float"]:
            lines.append(f"{t['name']}: in float, since integers change too many answers: {', '.join(t['kept_float'])}")
        if t["pruning"] and t["pruning"]["sentence"]:
            lines.append(t["pruning"]["sentence"])
    for c in result["compiled"]:
        lines.append(f"{c['name']}: {c['precision']}, {modelled(c, c['latency_ms'])} by {c['estimator']}; {placed(c)}")
    lines += [
        f"{p['name']}: a build plan{checked(p['checked'])}; next: vitrim build, on the device" for p in result["plans"]
    ]
    return [
        *lines,
        f"Wrote {result['bundle']} in {sum(result['timings_s'].values()):.0f} s; next: vitrim report {result['bundle']}",
    ]


def compared(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], warnings: Sequence[str]) -> list[Any]:
    """`compare`: one column per bundle, the first one the reader's baseline."""
    table = _table("Bundles side by side", ["", *names], [[label, *cells] for label, cells in rows])
    return [table, "Latencies are each bundle's own, measured when it was made.", *warnings]


def searched(found: Json) -> list[Any]:
    """`search`: every size tried, the front marked, and the pick."""
    rows = [
        [
            f"{p['target_macs']:.0%}",
            p["precision"],
            f"{p['latency_ms']:.3g}",
            f"{p['speedup']:.2f}x",
            _percent(p["agreement"], p["agreement_ci95"]),
            "yes" if p["on_front"] else "",
        ]
        for p in found["points"]
    ]
    columns = ["MACs kept", "precision", "ms", "speed-up", "same answer (held-out)", "on the front"]
    return [_table("Sizes tried", columns, rows), f"Picked {found['sentence']}"]


def accuracy(found: Json) -> list[Any]:
    """`eval`."""
    lines = [f"{found['source']} on {found['target']} ({found['precision']}), {found['n']} images"]
    if found["top1"] is not None:
        lines.append(f"  top-1 {_percent(found['top1'], found['top1_ci95'])}, top-5 {_percent(found['top5'])}")
    if found["agreement"] is not None:
        rival = "its own float model" if found["reference"] == found["source"] else found["reference"]
        same = f"same class as {rival}: {_percent(found['agreement'])}, {found['flips']} flips"
        lines.append(f"  {same}, mean cosine {found['mean_cosine']:.5f}")
    if found["calibrated_on_them"]:
        seen = f"{found['calibration_images']} of these images"
        lines.append(f"  The bundle was calibrated on {seen}: measure on others (embedded: demo:eval).")
    return lines


def estimated(found: Json) -> list[Any]:
    """`profile` of what only a simulator runs here."""
    chip, latency = found["device"]["chip"], found["latency_ms"]
    return [
        f"{found['target']} ({found['precision']}){f' on {chip}' if chip else ''}; nothing was run",
        f"  {modelled(found, latency and latency['p50'])} by {found['estimator']}, without: {found['leaves_out']}",
        f"  {placed(found)}",
    ]


def profile(found: Json) -> list[Any]:
    """`profile`."""
    if found.get("estimated"):
        return estimated(found)
    ms = found["latency_ms"]
    what = f"{found['target']} ({found['precision']}), {found['threads']} thread(s), batch {found['batch']}"
    line = f"{what}, {found['runs']} runs after {found['warmup']} warm-up"
    times = "  ".join(f"{name} {ms[name]:.3g}" for name in ("min", "p50", "p90", "p99", "mean"))
    cold = f"  load {found['load_ms']:.3g} ms, first run {found['first_run_ms']:.3g} ms"
    memory = f"peak memory {found['peak_rss_bytes'] / 1e6:.0f} MB"
    lines: list[Any] = [line, f"  latency ms: {times}", f"{cold}, {memory}"]
    if found["parts"]:
        rows = [
            [
                "" if part["block"] is None else str(part["block"]),
                part["part"],
                part["precision"],
                f"{part['time_ms']:.3f}",
                f"{part['share']:.1%}",
                "" if part["efficiency"] is None else f"{part['efficiency']:.0%}",
            ]
            for part in found["parts"]
        ]
        heads = ["block", "part", "precision", "ms", "share", "of this machine's peak"]
        lines.append(_table("Time per part of the network", heads, rows))
    if "throughput" in found:
        rate = found["throughput"]
        lines.append(f"  throughput {rate['images_per_s']:.4g} images/s with {rate['streams']} streams")
    if found["ops"]:
        slowest = sorted(found["ops"], key=lambda op: -op["time_ms"])[:25]
        rows = [
            [op["name"], op["type"], op["precision"], op["placement"], f"{op['time_ms']:.3f}", f"{op['share']:.1%}"]
            for op in slowest
        ]
        lines.append(
            _table(
                f"Slowest of {len(found['ops'])} operations",
                ["operation", "type", "precision", "on", "ms", "share"],
                rows,
            )
        )
    return lines
