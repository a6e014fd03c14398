"""One session in a process of its own, driven by JSON lines on stdin and stdout; torch-free.

    python -m compressor.worker
    > {"opener": "compressor.worker:open_bundle", "arguments": {"path": "b", "threads": 1}, "config": {"threads": 1}}
    < {"load_ms": 41.2, "first_run_ms": 6.0, "warmup": 11}
    > {"runs": 8}                    nanoseconds of eight more inferences, less the time spent waiting for a CPU
    < {"samples_ns": [...]}
    > {"profile": {"ops": true}}     everything `vitrim profile --json` prints
    < {"target": "ort", ...}
    (end of input ends the process)

A failure is answered as ``{"error": {"code", "message", "hint"}}`` and ends the process. What a runtime prints goes to
stderr, so it cannot disturb the protocol.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import IO, Any

import numpy as np

import targets
from compressor.affinity import pinned
from compressor.errors import VitrimError
from compressor.profile import Prepared, ProfileConfig, measure, prepare, sample_undisturbed
from compressor.profile_json import to_json
from compressor.types import Array, Session

__all__ = ["Opened", "main", "open_bundle"]

Opened = tuple[Callable[[], Session], Mapping[str, Array]]


def open_bundle(path: str, target: str | None = None, threads: int = 1, batch: int = 1) -> Opened:
    """What opens a session of the bundle at `path`, and its golden inputs repeated to `batch` images."""
    from compressor.bundle import Bundle

    bundle = Bundle.open(path)
    name = target or bundle.default_target
    pixels = bundle.golden["inputs"]
    runtime = targets.get(name)  # found here, so that a load time is the session's alone
    inputs = {bundle.artifact(name).inputs[0].name: np.resize(pixels, (batch, *pixels.shape[1:]))}

    def opener() -> Session:
        return runtime.open(bundle.artifact(name), threads=threads)  # keeps `bundle`, and what a .zip was unpacked to

    return opener, inputs


def main() -> int:
    """Serve the protocol on stdin and stdout until end of input; the process exit code."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # From here on anything printed, by Python or by a runtime's C++, goes to stderr
        try:
            _serve(sys.stdin, replies)
        except VitrimError as error:
            _reply(replies, {"error": {"code": error.code, "message": str(error), "hint": error.hint}})
            return error.exit_code
    return 0


def _serve(requests: IO[str], replies: IO[str]) -> None:
    spec = json.loads(requests.readline())
    config = ProfileConfig(**spec.get("config", {}))
    with pinned(config.threads):
        module, _, function = spec["opener"].partition(":")
        opener, inputs = getattr(importlib.import_module(module), function)(**spec.get("arguments", {}))
        ready = prepare(opener, inputs, config)
        _reply(replies, {"load_ms": ready.load_ms, "first_run_ms": ready.first_run_ms, "warmup": ready.warmup})
        for line in requests:
            _reply(replies, _answer(json.loads(line), ready, inputs, config))


def _answer(
    request: dict[str, Any], ready: Prepared, inputs: Mapping[str, Array], config: ProfileConfig
) -> dict[str, Any]:
    if "runs" in request:
        return {"samples_ns": sample_undisturbed(ready.session, inputs, runs=int(request["runs"]))}
    result = measure(ready, inputs, config)
    ops = ready.session.ops(inputs) if request["profile"].get("ops") else ()
    return to_json(replace(result, ops=ops))


def _reply(replies: IO[str], message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
