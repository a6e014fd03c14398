"""Runs inside a vendor's environment: serves the functions of one worker file, one JSON line per call.

    python -I _venv_worker.py WORKER_FILE MEMORY_BYTES          started by `targets._venv.Worker`, in its scratch folder
    > {"call": "compile", "arguments": {...}, "arrays": true}   arrays come in in.npz
    < {"result": {...}, "arrays": true}                         arrays go out in out.npz
    < {"error": "ValueError: ..."}

What the vendor's tool prints goes to stderr, which is the log. Python 3.10 or newer and NumPy; vitrim is not importable here.
When the process that started it ends, however it ends, this one and what its tool has started end at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import select
import signal
import sys
import traceback
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Serve calls from stdin until it ends."""
    _watch_stdin()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    limit = int(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    for line in sys.stdin:
        try:
            answer = answered(worker, json.loads(line))
        except (Exception, SystemExit) as error:  # noqa: BLE001 whatever a vendor's tool raises is an answer
            sys.stdout.flush()  # what the tool said comes before what it ended with
            traceback.print_exc()
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[-1] if text else ''}"}
        sys.stdout.flush()
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _watch_stdin() -> None:
    """End this process group when nobody can write to stdin any more: a fork waits for it.

    Not a thread, since a tool may hold the interpreter's lock for minutes; not PR_SET_PDEATHSIG, which is sent when the thread
    that started us ends, as that of one request to a server does.
    """
    if os.fork():
        return
    os.close(1)  # whose end tells that the worker has died
    os.close(2)
    waiting = select.poll()
    waiting.register(0, 0)  # hang-up alone: what comes in is the worker's to read
    waiting.poll()
    os.killpg(0, signal.SIGKILL)


def answered(worker: Any, request: Any) -> dict[str, Any]:
    """The answer to one call; NumPy is loaded only where arrays go in or out."""
    arrays: dict[str, Any] = {}
    if request["arrays"]:
        import numpy as np

        with np.load("in.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
    result, arrays = getattr(worker, request["call"])(request["arguments"], arrays)
    if arrays:
        import numpy as np

        np.savez("out.npz", **arrays)
    return {"result": result, "arrays": bool(arrays)}


if __name__ == "__main__":
    main()
