"""One job on a device, for `compressor.remote`: a line of JSON in, a marked line of JSON out; torch-free.

    python3 -m compressor.runner
    > {"job": "profile", "arguments": {"target": "ort", "threads": 1, "batch": 1, "per_op": false, "streams": 0}}
    < @vitrim {"result": {...}}                      or {"error": {"code", "message", "hint"}}

What the job is about was sent into the current folder, a bundle as ``bundle``. Input stays open while somebody waits for
the answer: when it ends, the connection was cut or the user has gone, and this process and its children end at once. A
vendor tool's worker, which leads a session of its own, sees its input end with us and ends too (`targets._venv_worker`): what
it leaves in TMPDIR goes with the job's folder, which the one who asked removes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compressor.errors import VitrimError
from compressor.probe import MARK

__all__ = ["BUILT", "BUNDLE", "JOBS", "main"]

BUNDLE, BUILT = Path("bundle"), Path("built.zip")


def main() -> int:
    """Do the job that standard input names, answer, and return 0: a failure is an answer too."""
    with suppress(PermissionError):  # Refused where we lead a session, and so a group, already
        os.setpgrp()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # What a runtime prints goes to stderr
        replies.write(MARK + json.dumps(_answer(request)) + "\n")
    return 0


def _end_with_input() -> None:
    while os.read(0, 1024):  # Not through sys.stdin: a thread waiting in it stops the interpreter from ending
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"result": JOBS[request["job"]](request["arguments"])}
    except VitrimError as error:
        return {"error": {"code": error.code, "message": str(error), "hint": error.hint}}
    except Exception as error:  # noqa: BLE001 - the one who asked sees no traceback of another machine, only this
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": {"code": "TargetUnavailable", "message": text, "hint": "Run the job there to see more."}}


def _profile(arguments: Mapping[str, Any]) -> dict[str, Any]:
    from compressor.errors import TargetUnavailable
    from compressor.inference import Source, profile_source

    measured = {name: arguments[name] for name in ("batch", "per_op", "streams")}
    found = profile_source(Source(str(BUNDLE), arguments["target"], arguments["threads"]), **measured)
    if found.get("estimated"):
        raise TargetUnavailable(
            f"target {found['target']!r}: the device must have the vendor's board package, got none.",
            hint="Without --device, profile gives the compiler's estimate.",
        )
    return found


def _verify(arguments: Mapping[str, Any]) -> dict[str, Any]:
    from compressor.inference import verify_bundle

    return verify_bundle(BUNDLE, arguments["target"]).data


def _build(arguments: Mapping[str, Any]) -> dict[str, Any]:
    from compressor.build_plan import BuildJob, build_bundle

    BUILT.unlink(missing_ok=True)  # Of a job that was cut
    return build_bundle(BUNDLE, BuildJob(**arguments), BUILT).data


def _race(arguments: Mapping[str, Any]) -> dict[str, Any]:
    from compressor.race import race_there

    return race_there(arguments)


JOBS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "build": _build,
    "profile": _profile,
    "race": _race,
    "verify": _verify,
}

if __name__ == "__main__":
    sys.exit(main())
