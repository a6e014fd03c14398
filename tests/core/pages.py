"""Reports to render, and a reader that is strict about the page."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np

from compressor.report import contact_sheet
from compressor.types import latency_ms

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.ids |= {values["id"] or ""} if "id" in values else set()
        self.links += [values[k] or "" for k in ("src", "href", "data", "action") if k in values]
        assert not any(name.startswith("on") for name in values), f"event handler in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def samples(ms: float, seed: int) -> list[int]:
    return (1e6 * ms * np.random.default_rng(seed).lognormal(sigma=0.05, size=60)).astype(int).tolist()


def report(**changes: Any) -> dict[str, Any]:
    """What `compress` writes for a model with one target and two candidates."""
    fast, before = samples(2.0, 1), samples(6.0, 3)
    base = {
        "model": "demo",
        "reference": {"params": 4_000_000, "macs": 200_000_000, "top1": 91.85, "top1_ci95": [90.5, 93.0]},
        "compressed": {
            "params": 2_000_000,
            "macs": 120_000_000,
            "top1": 91.5,
            "top1_ci95": [90.2, 92.7],
            "agreement": 99.1,
            "n": 2000,
        },
        "targets": [
            {
                "name": "ort",
                "precision": "w8a8",
                "size_bytes": 2_540_000,
                "latency_ms": latency_ms(tuple(fast)),
                "reference_latency_ms": latency_ms(tuple(before)),
                "speedup": 3.0,
                "parity": {"max_abs": 0.3, "cosine": 0.9999, "agreement": 99.6, "count": 256},
                "reverted": False,
                "reason": "w8a8 kept.",
            }
        ],
    }
    return {**base, **changes}


def everything() -> dict[str, Any]:
    full = report(
        blocks=[
            {
                "block": i,
                "part": part,
                "before": 768,
                "after": 384,
                "predicted": 0.01,
                "damping": 0.1,
                "measured": None,
                "fallback": "x" * i,
            }
            for i in range(2)
            for part in ("mlp", "qk")
        ],
        candidates=[
            {
                "target": "ort",
                "precision": p,
                "latency_ms": latency_ms(tuple(s)),
                "samples_ns": s,
                "agreement": a,
                "kept": p == "w8a8",
            }
            for p, s, a in (("w8a8", samples(2.0, 1), 99.6), ("fp32", samples(4.0, 2), 100.0))
        ],
        ops={
            "ort": [
                {
                    "name": "blocks.0.fc1.matmul",
                    "type": "MatMul",
                    "placement": "CPU",
                    "precision": "int8",
                    "time_ms": 0.5,
                }
            ]
        },
        reference_ops={
            "ort": [
                {
                    "name": "blocks.0.fc1.matmul",
                    "type": "MatMul",
                    "placement": "CPU",
                    "precision": "fp32",
                    "time_ms": 1.0,
                }
            ]
        },
        sensitivity={
            "rows": ["block 0"],
            "columns": ["qkv", "fc1"],
            "values": [[1e-3, 2e-3]],
            "unit": "Squared error.",
        },
        compiled=[
            {
                "name": "bpu",
                "precision": "w8a8",
                "size_bytes": 7_200_000,
                "settings": {"additions": "int8", "measured": "vitrim: divergence <0.001"},
                "parity": {"max_abs": 0.4, "cosine": 0.998, "agreement": 100.0, "count": 8},
                "latency_ms": 5.96,
                "estimator": "HBDK 3.49.15 timing model",
                "leaves_out": "reading the image",
                "npu_mac_share": 0.9,
                "subgraphs": [{"name": "a"}, {"name": "b"}],
                "cpu_ops": [{"name": "blocks.0.softmax", "type": "Softmax"}],
            }
        ],
        plans=[{"name": "tensorrt", "checked": {"engines": {}, "refused": {"fp32": "no builder here"}}}],
        contact_sheet={"image": contact_sheet(np.zeros((5, 8, 8, 1), np.uint8)), "caption": "5 of 512 images."},
        provenance={"versions": {"vitrim": "0.1.0"}, "seed": 0, "recipe": {"targets": ["ort"]}},
        timings_s={"prune": 1.25},
    )
    full["targets"][0]["reference_samples_ns"] = samples(6.0, 3)
    return full
