"""Vendor tools in virtual environments of their own, driven through a process with limits.

Their pins contradict ours and each other's (Python 3.10, NumPy 1.23, protobuf 3.20), so none is ever imported here. Environments
live in the user's data folder, are made by ``vitrim doctor --install NAME`` and hold only what the recipe pins; the vendors'
licences are between them and the user.

    RECIPE = Recipe("foo", "3.10", (("foo-compiler==1.2",),), module="foo")
    with Worker(RECIPE, Path(__file__).with_name("_foo_worker.py"), log=folder / "build.log") as worker:
        reply, arrays = worker.call("compile", {"onnx": "m.onnx"}, {"calibration": batch})

A worker file holds plain functions ``name(arguments: dict, arrays: dict) -> (dict, dict)``, run by the environment's own
interpreter: it imports the vendor's tool, never vitrim. See `_venv_worker.py` for the protocol.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from compressor.errors import TargetUnavailable
from compressor.types import Array, Availability

__all__ = ["Limits", "Recipe", "Worker", "availability", "folder", "install"]

MARKER = "vitrim.json"  # written last: an environment without it is unfinished
HOST = Path(__file__).with_name("_venv_worker.py")
INSTALL_SECONDS = 3600
QUOTED = 3  # lines of a log that does not stay


@dataclass(frozen=True)
class Recipe:
    """How an environment is made.

    Args:
        name: of the environment's folder, and of the target on the command line.
        python: ``"3.10"`` where the tool needs that interpreter; empty for the one running now.
        steps: arguments of successive ``pip install`` calls.
        module: imported once after the installation, to prove that it works.
        package: distribution whose version `availability` reports.
        files: extra modules, file name in site-packages -> source text.
    """

    name: str
    python: str
    steps: tuple[tuple[str, ...], ...]
    module: str
    package: str
    files: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Changes with anything that would be installed, so that an outdated environment is noticed."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Limits:
    """What a worker may use: seconds per call, and bytes of address space."""

    seconds: float = 600.0
    memory_bytes: int = 32 << 30


def folder(recipe: Recipe) -> Path:
    """``$XDG_DATA_HOME/vitrim/venvs/NAME``, by default under ``~/.local/share``."""
    base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "vitrim" / "venvs" / recipe.name


def availability(recipe: Recipe) -> Availability:
    """Whether the environment is installed and current; reads one file and starts nothing."""
    fix = f"vitrim doctor --install {recipe.name}"
    try:
        marker = json.loads((folder(recipe) / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Availability(available=False, reason=f"{recipe.package} is not installed", fix=fix)
    if marker.get("recipe") != recipe.digest():
        reason = f"its environment was made by another version of vitrim ({recipe.package} {marker.get('version')})"
        return Availability(available=False, reason=reason, fix=fix)
    return Availability(available=True, version=str(marker.get("version", "")))


def install(recipe: Recipe, say: Callable[[str], None]) -> Path:
    """Create the environment of `recipe` afresh and return its folder; `say` gets one sentence per step.

    Raises:
        TargetUnavailable: no such Python, or pip failed; the log is kept beside the environment.
    """
    home = folder(recipe)
    if availability(recipe).available:
        say(f"{recipe.name}: already installed in {home}")
        return home
    python = find_python(recipe.python)
    say(f"{recipe.name}: the packages are the vendor's, under the vendor's licence; by installing you accept it")
    if home.exists():
        shutil.rmtree(home)
    home.mkdir(parents=True)
    log = home.with_suffix(".log")
    log.write_text("", encoding="utf-8")
    _logged([python, "-m", "venv", str(home)], log, recipe)
    for step in recipe.steps:
        say(f"{recipe.name}: pip install {' '.join(step)}")
        pip = [str(_python(recipe)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        _logged([*pip, *step], log, recipe)
    for name, source in recipe.files.items():
        (_site(recipe) / name).write_text(source, encoding="utf-8")
    code = f"import importlib.metadata as m, {recipe.module}; print(m.version({recipe.package!r}))"
    lines = _logged([str(_python(recipe)), "-I", "-c", code], log, recipe).strip().splitlines()
    marker = {"recipe": recipe.digest(), "version": lines[-1]}
    (home / MARKER).write_text(json.dumps(marker), encoding="utf-8")
    say(f"{recipe.name}: {recipe.package} {lines[-1]} installed in {home}")
    return home


def find_python(version: str) -> str:
    """An interpreter of `version`: on PATH, or among those of pyenv and uv. Each candidate is asked, since shims may refuse.

    Raises:
        TargetUnavailable: there is none.
    """
    if not version:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    uv = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "uv" / "python"
    found = [shutil.which(f"python{version}")]
    found += [str(p) for p in sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
    found += [str(p) for p in sorted(uv.glob(f"cpython-{version}.*/bin/python"), reverse=True)]
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, found):
        asked = subprocess.run([candidate, "-I", "-c", code], capture_output=True, text=True, check=False, timeout=60)
        if asked.returncode == 0 and asked.stdout.strip() == version:
            return candidate
    raise TargetUnavailable(
        f"Python {version} must be installed for this vendor's tools, got none on PATH, in pyenv or in uv.",
        hint=f"Install it, for example: pyenv install {version}, or uv python install {version}.",
    )


def _python(recipe: Recipe) -> Path:
    return folder(recipe) / "bin" / "python"


def _site(recipe: Recipe) -> Path:
    return next((folder(recipe) / "lib").glob("python*/site-packages"))


def _logged(command: list[str], log: Path, recipe: Recipe) -> str:
    """The command's standard output; everything it prints is appended to `log`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.returncode == 0:
        return done.stdout
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    raise TargetUnavailable(
        f"The environment of {recipe.name!r} must install, got: {last}", hint=f"The whole log is {log}."
    )


class Worker:
    """One process in a recipe's environment; several calls may share it, as a simulator's inferences do.

    Args:
        recipe: of the environment.
        script: file of plain functions, run by the environment's interpreter.
        log: receives everything the vendor's tool prints; appended to. None: one that ends with the worker, and whose last
            lines an error quotes.
        limits: seconds per call, memory of the process.
        known: fragment of the log -> what it means and what to do, for failures that have been understood.

    Raises:
        TargetUnavailable: the environment is not installed; from `call`: the tool failed, crashed or took too long.
    """

    def __init__(
        self,
        recipe: Recipe,
        script: Path,
        log: Path | None = None,
        limits: Limits | None = None,
        known: Mapping[str, str] | None = None,
    ) -> None:
        state = availability(recipe)
        if not state.available:
            raise TargetUnavailable(
                f"Target {recipe.name!r} is not available: {state.reason}.", hint=f"Run: {state.fix}"
            )
        self._recipe, self._limits, self._known = recipe, limits or Limits(), known or {}
        self._scratch = Path(tempfile.mkdtemp(prefix="vitrim-"))
        self.log, self._log_stays = log or self._scratch / "log", log is not None
        python = _python(recipe)
        command = [str(python), "-I", str(HOST), str(script), str(self._limits.memory_bytes)]
        path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = {
            **os.environ,
            "PATH": path,
            "TMPDIR": str(self._scratch),
        }  # what a tool forgets goes with the worker
        with self.log.open("ab") as stream:
            self._start = stream.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=self._scratch,
                env=environment,
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, self._process, self._scratch)  # also when nobody closes it

    def call(
        self, name: str, arguments: Mapping[str, Any], arrays: Mapping[str, Array] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """What function `name` of the script returns for `arguments` (JSON) and `arrays`."""
        scratch = self._scratch
        given: dict[str, Any] = dict(arrays or {})
        if given:
            np.savez(scratch / "in.npz", **given)
        line = json.dumps({"call": name, "arguments": dict(arguments), "arrays": bool(given)}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            reply = self._reply(name)
        except BrokenPipeError:
            reply = None
        if reply is None:
            raise self._failure(name, f"a process that ended with {_how(self._process.wait())}")
        if "error" in reply:
            raise self._failure(name, str(reply["error"]).rstrip("."))
        if not reply["arrays"]:
            return reply["result"], {}
        with np.load(scratch / "out.npz", allow_pickle=False) as stored:
            return reply["result"], dict(stored)

    def _reply(self, name: str) -> dict[str, Any] | None:
        """The next line the worker answers; None when it died. Kills it and raises when the time is over."""
        assert self._process.stdout is not None
        stream, buffer = self._process.stdout.fileno(), b""
        deadline = time.monotonic() + self._limits.seconds
        while not buffer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                _kill(self._process)
                raise self._failure(name, f"no answer within {self._limits.seconds:g} s, so it was stopped")
            chunk = os.read(stream, 1 << 16)
            if not chunk:
                return None
            buffer += chunk
        reply: dict[str, Any] = json.loads(buffer)
        return reply

    def _failure(self, name: str, what: str) -> TargetUnavailable:
        """One sentence: what the tool did, its last words, and the fix where the failure is known."""
        with self.log.open("rb") as stream:
            stream.seek(self._start)
            text = stream.read().decode(errors="replace")
        hints = [hint for fragment, hint in self._known.items() if fragment in text or fragment in what]
        return TargetUnavailable(
            f"{self._recipe.package}: {name!r} must succeed, got {what}.",
            hint=" ".join([*hints, f"Its log is {self.log}." if self._log_stays else _last_words(text)]),
        )

    def close(self) -> None:
        """End the process; its scratch folder goes with it."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker and every process it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end(process: subprocess.Popen[bytes], scratch: Path) -> None:
    _kill(process)
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            if stream is not None:
                stream.close()
    shutil.rmtree(scratch, ignore_errors=True)


def _last_words(text: str) -> str:
    """The last lines of a log, without the traceback, whose last line is the error itself."""
    said = text.rpartition("Traceback (most recent call last):")[0].strip() or text.strip()
    lines = [line.strip() for line in said.splitlines()[-QUOTED:]]
    return f"Its last words: {' / '.join(lines)}" if lines else "It said nothing else."


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
