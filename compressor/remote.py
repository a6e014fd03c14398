"""A bundle's job on another machine: copied there, run there, its JSON brought back, and nothing left behind.

What is sent: the bundle, and the Python sources of `compressor`, `calibration` and `targets` that need no torch. They
go into a temporary folder that ``mktemp -d`` makes, as the user who logs in, and the device's own Python runs
`compressor.runner` there. Nothing is installed and nothing outside that folder is written.

A cut connection is met `ATTEMPTS` times in all: files that are there with the right sha256 are not sent again, the job
whose connection was cut has ended (see `compressor.runner`), and starts anew. The folder is removed at the end, on
errors and on Ctrl-C too.

What comes back is checked in `compressor.replies`; no name or text from there reaches a shell here.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from typing import IO, Any

from compressor import probe, replies
from compressor.build_plan import BuildJob, adopt, built
from compressor.bundle import Bundle, is_bundle
from compressor.errors import ConfigError, TargetUnavailable
from compressor.inference import Source, open_to_verify, verified
from compressor.inventory import Device
from compressor.manifest import MAX_FILE_BYTES, sha256_file
from compressor.output import file_or_folder
from compressor.profile import ProfileConfig
from compressor.race import Inputs, Race, Raced, packed
from compressor.result import Result
from compressor.runner import BUILT, BUNDLE
from compressor.signature import check_signature
from compressor.transport import transport
from compressor.types import Artifact, Session

__all__ = ["ATTEMPTS", "Remote", "build_on", "profile_on", "race_on", "verify_on"]

ATTEMPTS = 3
OLDEST = [3, 11]
MAX_ANSWER_BYTES = 256 << 20
TAIL_BYTES = 1 << 16  # of what a command there complains of
NO_SPACE = ("no space left", "quota exceeded", "disk full")
SLACK_BYTES = 1 << 20  # folders and block rounding
FOLDER = re.compile(r"/[\w.+/-]*/vitrim-\w+")
PACKAGES = ("compressor", "calibration", "targets")
NOT_SENT = {"checkpoint", "demo", "prune", "quantize", "report"}  # parts of compressor that no job there uses
Note = Callable[[str], None]


class _Lost(Exception):
    """The connection failed; what ssh or adb said."""


@dataclass(frozen=True)
class _File:
    path: Path
    sha256: str
    size: int


class Remote:
    """A temporary folder on a device, and jobs done in it; a context manager that removes the folder.

    Raises:
        TargetUnavailable: the device cannot be reached, lacks something, is full, or was lost `ATTEMPTS` times.
    """

    def __init__(self, device: Device, note: Note) -> None:
        self._device, self._way, self._note = device, transport(device.url), note
        self._folder = ""

    def __enter__(self) -> Remote:
        where = f"umask 077; d=$(mktemp -d {self._way.scratch}/vitrim-XXXXXXXXXX) && printf '\\n%s\\n' \"$d\""
        try:
            said = self._call(where).splitlines()
        except _Lost as lost:
            raise TargetUnavailable(
                f"{self._device.url}: the device must be reachable without a prompt, got: {lost}.",
                hint=f"Try it by hand: {self._way.by_hand}",
            ) from None
        folder = said[-1] if said else ""
        if not FOLDER.fullmatch(folder):
            got = replies.readable(folder)
            raise TargetUnavailable(f"{self._device.url}: mktemp there must print a plain path, got {got!r}.")
        self._folder = folder
        return self

    def __exit__(self, *_: object) -> None:
        script = f"rm -rf {shlex.quote(self._folder)} || {{ sleep 1; rm -rf {shlex.quote(self._folder)}; }}"
        try:
            self._again(lambda: self._call(script))
        except TargetUnavailable:
            self._note(f"{self._device.url}: {self._folder} could not be removed; remove it by hand.")

    def run(self, about: Mapping[str, _File], job: str, arguments: Mapping[str, Any]) -> Any:
        """The result of `job` (see `compressor.runner`) on the files `about`, as it came: to be checked by its reader."""
        wanted = _code() | dict(about)
        request = json.dumps({"job": job, "arguments": dict(arguments)}) + "\n"

        def attempt() -> str:
            self._send(wanted)
            run = f"exec {shlex.quote(self._device.python)} -m compressor.runner"
            return self._call(self._there(run), lambda pipe: _write(pipe, request), hold=True)

        answer = self._marked(self._again(attempt))
        if "error" in answer:
            raise replies.failure(answer["error"], self._device.url)
        return answer.get("result")

    def fetch(self, name: str, to: Path) -> None:
        """The file `name` of the folder as the local file `to`."""

        def attempt() -> str:
            with to.open("wb") as sink:
                return self._call(self._there(f"cat {shlex.quote(name)}"), sink=sink)

        self._again(attempt)

    # ----------------------------------------------------------------------- the steps

    def _again(self, attempt: Callable[[], str]) -> str:
        """What `attempt` returns, tried again after a cut."""
        for left in range(ATTEMPTS - 1, -1, -1):
            try:
                return attempt()
            except _Lost as lost:
                if not left:
                    raise TargetUnavailable(
                        f"{self._device.url}: the connection was cut {ATTEMPTS} times, last with: {lost}.",
                        hint=f"{self._folder} may be left there. Try it by hand: {self._way.by_hand}",
                    ) from None
                self._note(f"{self._device.url}: connection cut ({lost}); attempt {ATTEMPTS - left + 1} of {ATTEMPTS}")
                sleep(ATTEMPTS - left)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, wanted: Mapping[str, _File]) -> None:
        """Send what is not there yet."""
        there = self._examine()
        missing = {name: file for name, file in wanted.items() if there.files.get(name) != file.sha256}
        size = sum(file.size for file in missing.values())
        if size + SLACK_BYTES > there.free_bytes:
            raise self._full(f"{size / 1e6:.1f} MB are to be sent, {there.free_bytes / 1e6:.1f} MB are free")
        self._note(f"{self._device.url}: sending {len(missing)} of {len(wanted)} files, {size / 1e6:.1f} MB")
        if missing:
            self._call(self._there("mkdir -p tmp && tar -xof -"), lambda pipe: _pack(pipe, missing))

    def _examine(self) -> replies.Found:
        """What is there; refused where Python or a package is missing."""
        url, python = self._device.url, self._device.python
        program = Path(probe.__file__).read_text(encoding="utf-8")
        said = self._call(self._there(f"exec {shlex.quote(python)} -"), lambda pipe: _write(pipe, program))
        there = replies.found(self._marked(said))
        if there.python[:2] < OLDEST:
            version = ".".join(map(str, there.python))
            hint = f"Name a newer one: vitrim device add NAME {url} --python /path/to/python3.11"
            raise TargetUnavailable(f"{url}: {python} must be Python 3.11 or later, got {version}.", hint=hint)
        if there.missing:
            names = ", ".join(there.missing)
            hint = f"On the device: {python} -m pip install {' '.join(probe.NEEDED.values())}, and the runtime."
            raise TargetUnavailable(
                f"{url}: {python} must have numpy, pillow and pydantic, {names} missing.", hint=hint
            )
        return there

    def _marked(self, text: str) -> dict[str, Any]:
        answer = replies.marked(text)
        if answer is None:
            last = replies.readable((text.strip().splitlines() or ["nothing"])[-1])
            raise TargetUnavailable(f"{self._device.url}: the job must answer, got: {last}.")
        return answer

    def _there(self, script: str) -> str:
        """`script` in the folder, with our sources first and its temporary files in it."""
        folder = shlex.quote(self._folder)
        path = f'PYTHONPATH={folder}/code"${{PYTHONPATH:+:$PYTHONPATH}}"'
        return f"cd {folder} && export {path} TMPDIR={folder}/tmp PYTHONDONTWRITEBYTECODE=1 && {script}"

    # ----------------------------------------------------------------------- one command

    def _call(
        self,
        script: str,
        feed: Callable[[IO[bytes]], None] | None = None,
        *,
        hold: bool = False,
        sink: IO[bytes] | None = None,
    ) -> str:
        """Standard output of `script` there.

        Args:
            script: one line of POSIX shell.
            feed: writes its standard input.
            hold: keep its input open until it has ended.
            sink: where its output goes instead.
        """
        command, pipe = self._way.command(script), subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        except FileNotFoundError:
            raise TargetUnavailable(
                f"{self._device.url}: {command[0]} must be installed here.", hint=f"Install {command[0]}."
            ) from None
        assert process.stderr is not None
        complaints = _Tail(process.stderr)
        out = _converse(process, feed, sink, hold=hold)
        said = complaints.text()
        if process.returncode == 0:
            return out
        last = replies.readable((said.strip().splitlines() or ["nothing"])[-1]).rstrip(". ")
        if self._way.lost(process.returncode, said):
            raise _Lost(last)
        if any(words in said.lower() for words in NO_SPACE):
            raise self._full(last)
        raise TargetUnavailable(f"{self._device.url}: a command there failed: {last}.", hint=self._advice())

    def _full(self, why: str) -> TargetUnavailable:
        return TargetUnavailable(
            f"{self._device.url}: the device must have room for the bundle, its disk is full: {why}.",
            hint="Free some space there, or point TMPDIR there to another disk.",
        )

    def _advice(self) -> str:
        return f"It needs sh, mktemp, tar and Python 3.11 or later as {self._device.python}."


class _Tail(threading.Thread):
    """The last words of a pipe, read while it is written: what a device complains of fills neither memory nor disk."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe, self._kept = pipe, b""
        self.start()

    def run(self) -> None:
        with self._pipe:
            while piece := self._pipe.read1(1 << 16):  # type: ignore[attr-defined]
                self._kept = (self._kept + piece)[-TAIL_BYTES:]

    def text(self) -> str:
        """What was last said; ssh's own background process may keep the pipe open for longer."""
        self.join(timeout=1.0)
        return self._kept.decode("utf-8", "replace")


def _converse(
    process: subprocess.Popen[bytes], feed: Callable[[IO[bytes]], None] | None, sink: IO[bytes] | None, *, hold: bool
) -> str:
    """Feed a process, read it to its end and wait for it; it never outlives this call."""
    assert process.stdin is not None and process.stdout is not None
    try:
        with suppress(BrokenPipeError):  # It has ended; its status says why
            if feed is not None:
                feed(process.stdin)
            process.stdin.flush() if hold else process.stdin.close()
        text, taken, most = bytearray(), 0, MAX_ANSWER_BYTES if sink is None else MAX_FILE_BYTES
        while piece := process.stdout.read1(1 << 20):  # type: ignore[attr-defined]
            taken += len(piece)
            if taken > most:
                raise TargetUnavailable(f"the device's answer must be at most {most} bytes, got more.")
            if sink is None:
                text += piece
            else:
                sink.write(piece)
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()
    return text.decode("utf-8", "replace")


def _write(pipe: IO[bytes], text: str) -> None:
    pipe.write(text.encode())


def _pack(pipe: IO[bytes], files: Mapping[str, _File]) -> None:
    with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for name, file in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = file.size, 0o600
            with file.path.open("rb") as content:
                archive.addfile(entry, content)


def _code() -> dict[str, _File]:
    """The sources that a device runs, by their name there."""
    root, found = Path(__file__).parents[1], {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root)
            if not NOT_SENT & set(name.parts):
                found[f"code/{name.as_posix()}"] = _file(path)
    return found


def _contents(bundle: Bundle) -> dict[str, _File]:
    """The files of a bundle, whose digests were checked when it was opened."""
    entries = bundle.manifest.files.items()
    found = {f"{BUNDLE}/{name}": _File(bundle.root / name, e.sha256, e.size) for name, e in entries}
    return {**found, f"{BUNDLE}/manifest.json": _file(bundle.root / "manifest.json")}


# --------------------------------------------------------------------------- the commands


def profile_on(
    device: Device, source: Source, note: Note, *, batch: int, per_op: bool, streams: int = 0
) -> dict[str, Any]:
    """The ``vitrim profile --json`` object of a bundle on `device`; the same keys as `inference.profile_source` gives.

    Raises:
        ConfigError: `source` is a model: its artifact has to be built first.
        TargetUnavailable: see `Remote`.
    """
    if not is_bundle(source.path):
        raise ConfigError(
            f"{source.path}: --device must be given a bundle, got a model.",
            hint=f"Make one: vitrim compress {source.path} --out b",
        )
    bundle = Bundle.open(source.path)
    if source.target is not None:
        bundle.artifact(source.target)  # A wrong target is named before anything is sent
    names = tuple(bundle.manifest.targets) if source.target is None else (source.target,)
    allowed = {"target": names, "threads": (source.threads,), "batch": (batch,)}
    asked = {"target": source.target, "threads": source.threads, "batch": batch, "per_op": per_op, "streams": streams}
    with Remote(device, note) as there:
        return replies.profile(there.run(_contents(bundle), "profile", asked), allowed)


def verify_on(device: Device, path: Path, target: str | None, signers: Path | None, note: Note) -> Result:
    """`inference.verify_bundle` on `device`, after hashes and signature were checked here."""
    bundle = open_to_verify(path)
    signature = check_signature(bundle.root / "manifest.json", signers)
    if target is not None:
        bundle.artifact(target)
    names = bundle.manifest.targets if target is None else (target,)
    with Remote(device, note) as there:
        checks = replies.checks(there.run(_contents(bundle), "verify", {"target": target}), names)
    return verified(path, len(bundle.manifest.files), checks, signature)


def build_on(device: Device, path: Path, job: BuildJob, out: Path | None, note: Note, *, force: bool = False) -> Result:
    """`build_plan.build_bundle` on `device`: the completed bundle is brought back to `out`, by default in place.

    Raises:
        BundleError: what came back is not a bundle, or differs in more than that target.
        ConfigError: `out` may not be replaced.
        ParityError: its outputs are not those of the model.
        TargetUnavailable: see `Remote`.
    """
    bundle, goal = Bundle.open(path), out or path
    bundle.artifact(job.target)
    with (
        file_or_folder(goal, force=force or out is None, zipped=goal.suffix == ".zip") as folder,  # refused first
        Remote(device, note) as there,
        tempfile.TemporaryDirectory(prefix="vitrim-") as work,
    ):
        answer = there.run(_contents(bundle), "build", asdict(job))
        found = replies.built(answer, {"target": (job.target,)})
        archive = Path(work) / BUILT
        there.fetch(str(BUILT), archive)
        complete = Bundle.open(archive)  # Every path and hash checked
        adopt(bundle, complete, job.target, folder)
    return built(goal, found)


def race_on(device: Device, note: Note) -> Race:
    """The race of `compress --device`: artifacts built here run against each other on `device`."""

    def race(
        artifacts: Mapping[str, Artifact], sessions: Mapping[str, Session], inputs: Inputs, config: ProfileConfig
    ) -> Raced:
        expected = {name: sessions[name].run(inputs)[a.outputs[0].name] for name, a in artifacts.items()}
        (target,) = {a.target for a in artifacts.values()}
        with Remote(device, note) as there, tempfile.TemporaryDirectory(prefix="vitrim-") as work:
            files, entries = packed(artifacts, expected, inputs, Path(work))
            asked = {"target": target, "artifacts": entries, "config": asdict(config)}
            return replies.raced(there.run({n: _file(p) for n, p in files.items()}, "race", asked), artifacts)

    return race


def _file(path: Path) -> _File:
    return _File(path, sha256_file(path), path.stat().st_size)
