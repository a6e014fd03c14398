"""Jobs on another machine: a real sshd on loopback with its own host key, user key and, where root, a restricted user."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor import checkpoint
from compressor.bundle import Bundle, artifact_entry, seal
from compressor.candidates import build
from compressor.types import BuildOptions
from tests.cli.conftest import ROOT as ROOT_FOLDER
from tests.cli.conftest import Done, vitrim
from tests.cli.test_errors import heed_interrupts
from tests.core.test_build_plan import PLUGIN
from tests.core.test_build_plan import bundle as planned_bundle
from tests.targets.networks import PLAIN, model, pixels, pruned

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
ROOT = os.geteuid() == 0
pytestmark = [
    pytest.mark.skipif(SSHD is None, reason="no sshd is installed (Debian: openssh-server)"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh is installed (Debian: openssh-client)"),
]


@dataclass
class Server:
    """An sshd on 127.0.0.1 and the client settings that reach it."""

    home: Path  # of the server's own files, readable by its user
    user: str
    port: int
    python: str
    process: subprocess.Popen[bytes]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}"

    @property
    def left(self) -> list[str]:
        """What is in the folder that temporary folders are made in."""
        return sorted(p.name for p in (self.home / "tmp").iterdir())

    def running(self) -> list[int]:
        """Jobs that run on the device: processes whose folder is one of ours."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                where = (process / "cwd").readlink()
                if where.is_relative_to(self.home / "tmp") and b"runner" in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found

    def cut(self) -> None:
        """Kill the server's side of every connection, but not the server."""
        for process in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{process}/comm").read_text().startswith("sshd"):
                    os.kill(process, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [d for child in map(int, children) for d in (child, *descendants(child))]
    return []


def usable(user: str, site: str) -> str | None:
    """A Python that `user` may run and that finds what a device needs."""
    probe = [f"PYTHONPATH={site}", "HOME=/", "@", "-c", "import numpy, PIL, pydantic, onnxruntime"]
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        command = ["runuser", "-u", user, "--", "env", *(python if word == "@" else word for word in probe)]
        if subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0:
            return python
    return None


@contextlib.contextmanager
def device_user(home: Path, site: str) -> Iterator[tuple[str, str]]:
    """Name and Python of a restricted user made for this, or of the current one where that is not possible."""
    own = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    user = f"vitrim-{os.getpid()}"
    made = ROOT and all(map(shutil.which, ("useradd", "userdel", "runuser")))
    if made:
        made = (
            subprocess.run(["useradd", "-M", "-d", home, "-s", "/bin/sh", "-p", "*", user], check=False).returncode == 0
        )
    try:
        python = usable(user, site) if made else None
        yield (user, python) if python else (own, sys.executable)
    finally:
        if made:
            subprocess.run(["userdel", "-f", user], check=False, capture_output=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def keys(home: Path) -> None:
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True)


@contextlib.contextmanager
def serve(home: Path, user: str, python: str, site: str) -> Iterator[Server]:
    port = free_port()
    settings = [
        *(f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {home}/host", f"AuthorizedKeysFile {home}/authorized"),
        *("UsePAM no", "StrictModes no", "PasswordAuthentication no", "KbdInteractiveAuthentication no"),
        *(f"PidFile {home}/pid", f"AllowUsers {user}", "PermitRootLogin prohibit-password"),
        f"SetEnv PYTHONPATH={site}:{home}/site TMPDIR={home}/tmp OMP_NUM_THREADS=1",
    ]
    (home / "sshd_config").write_text("\n".join(settings) + "\n")
    (home / "authorized").write_text((home / "user.pub").read_text())
    if ROOT:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, where its package did not make it
    with (home / "sshd.log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", home / "sshd_config"], stderr=log)
    try:
        deadline = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        if process.poll() is not None:
            pytest.skip(f"sshd does not start here: {(home / 'sshd.log').read_text()[-300:]}")
        yield Server(home, user, port, python, process)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    home = Path(tempfile.mkdtemp(prefix="vitrim-sshd-"))
    site = str(Path(np.__file__).parents[1])  # of the environment that runs these tests
    try:
        with device_user(home, site) as (user, python):
            keys(home)
            for folder in ("tmp", "site/planned-1.dist-info", "bin", "config"):
                (home / folder).mkdir(parents=True)
            (home / "site/planned_target.py").write_text(PLUGIN)
            (home / "site/planned-1.dist-info/METADATA").write_text(
                "Metadata-Version: 2.1\nName: planned\nVersion: 1\n"
            )
            (home / "site/planned-1.dist-info/entry_points.txt").write_text(
                "[vitrim.targets]\nplanned = planned_target\n"
            )
            home.chmod(0o755)
            shutil.chown(home / "tmp", user)
            with serve(home, user, python, site) as running:
                client(running, identity="user")
                added = vitrim("device", "add", "board", running.url, "--python", python, env=running.env)
                assert added.code == 0, added.err
                yield running
    finally:
        shutil.rmtree(home, ignore_errors=True)


def client(server: Server, identity: str, *, known: bool = True) -> dict[str, str]:
    """Environment in which `ssh` means the system's, with this test's key and known hosts; the user's own are not read."""
    home, name = server.home, f"{identity}-{known}"
    hosts, folder = home / f"known-{name}", home / "bin" / name
    host_key = " ".join((home / "host.pub").read_text().split()[:2])
    hosts.write_text(f"[127.0.0.1]:{server.port} {host_key}\n" if known else "")
    config = home / f"ssh-{name}"
    config.write_text(
        f"IdentityFile {home}/{identity}\nIdentitiesOnly yes\nIdentityAgent none\n"
        f"UserKnownHostsFile {hosts}\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n"
    )
    folder.mkdir(exist_ok=True)
    wrapper = folder / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
    wrapper.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "XDG_CONFIG_HOME": str(home / "config")}
    if identity == "user" and known:
        server.env = env
    return env


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed bundle of a tiny network for ONNX Runtime."""
    folder, network = tmp_path_factory.mktemp("small") / "b", model(pruned(PLAIN))
    folder.mkdir()
    checkpoint.save(network, folder)
    artifact = build(network, "ort", BuildOptions(folder / "targets/ort", "fp32", "fp32"))
    images = pixels(PLAIN, 8)
    from targets import ort

    session = ort.open(artifact)
    logits = session.run({artifact.inputs[0].name: images})[artifact.outputs[0].name]
    np.savez(folder / "golden.npz", inputs=images, reference=logits, **{"outputs.ort": logits})
    content: dict[str, object] = {key: {} for key in ("recipe", "versions", "calibration", "checkpoint")}
    content |= {"spec": asdict(network.spec), "preprocess": asdict(network.preprocess), "labels": [], "seed": 0}
    seal(folder, {**content, "targets": {"ort": artifact_entry(artifact, folder).model_dump()}})
    return folder


def there(server: Server, *arguments: object) -> Done:
    return vitrim(*arguments, "--device", "board", "--json", env=server.env, timeout=300)


def test_profile_there_has_the_keys_of_a_profile_here_and_leaves_nothing(server: Server, small: Path) -> None:
    done = there(server, "profile", small, "--per-op", "--streams", 1)
    assert done.code == 0, done.err
    here = vitrim("profile", small, "--per-op", "--streams", 1, "--json").json
    assert done.json.keys() == here.keys()
    assert done.json["device"].keys() == here["device"].keys()
    assert done.json["ops"][0].keys() == here["ops"][0].keys()
    assert done.json["latency_ms"]["p50"] == pytest.approx(np.percentile(done.json["samples_ns"], 50) / 1e6)
    assert server.left == [] and server.running() == []


def test_the_device_is_the_one_that_was_measured(server: Server, small: Path) -> None:
    done = there(server, "profile", small, "--batch", 2, "--target", "ort")
    assert done.code == 0, done.err
    assert done.json["target"] == "ort" and done.json["batch"] == 2
    version = subprocess.run([server.python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    assert done.json["device"]["versions"]["python"] == version


def test_verify_there_passes_and_sees_other_outputs(server: Server, small: Path, tmp_path: Path) -> None:
    done = there(server, "verify", small)
    assert done.code == 0 and done.json == {**vitrim("verify", small, "--json").json, "targets": done.json["targets"]}
    assert [(c["target"], c["passed"]) for c in done.json["targets"]] == [("ort", True)]
    broken = altered(small, tmp_path / "b")
    assert there(server, "verify", broken).code == 1
    assert server.left == []


def altered(bundle: Path, to: Path) -> Path:
    """The bundle with other expected outputs, hashes correct."""
    shutil.copytree(bundle, to)
    golden = dict(np.load(to / "golden.npz"))
    np.savez(to / "golden.npz", **{**golden, "outputs.ort": np.roll(golden["outputs.ort"], 1, axis=1)})
    content = json.loads((to / "manifest.json").read_text())
    seal(to, {key: value for key, value in content.items() if key not in ("schema", "files")})
    return to


def test_a_plan_is_completed_there_and_brought_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(server.home / "site"))
    plan, out = planned_bundle(tmp_path / "plan", "planned"), tmp_path / "built"
    done = there(server, "build", plan, "--target", "planned", "--out", out)
    assert done.code == 0, done.err
    assert done.json["bundle"] == str(out) and done.json["precision"] in ("fp32", "fp16", "w8a8")
    assert Bundle.open(out).manifest.targets["planned"].settings == {"stage": "engine"}
    assert Bundle.open(plan).manifest.targets["planned"].settings["stage"] == "plan"
    assert server.left == []


def test_candidates_race_there_and_the_report_says_so(server: Server, tmp_path: Path, cache: dict[str, str]) -> None:
    out = tmp_path / "b"
    options = ("--precision", "w8a8", "--calib-size", 32, "--target", "ort", "--out", out)
    done = vitrim("compress", "demo", *options, "--device", "board", "--json", env={**server.env, **cache})
    assert done.code == 0, done.err
    assert "sending" in done.err and {"fp32", "w8a8"} == {c["precision"] for c in stored(out)["candidates"]}
    version = subprocess.run([server.python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    assert stored(out)["provenance"]["device"]["versions"]["python"] == version
    assert stored(out)["ops"]["ort"] and done.json["targets"][0]["latency_ms"]["p50"] > 0
    assert vitrim("verify", out).code == 0 and server.left == []


def stored(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "report.json").read_text())
    return content


def test_a_compress_whose_device_is_away_leaves_nothing(tmp_path: Path, cache: dict[str, str]) -> None:
    options = ("--precision", "fp32", "--calib-size", 32, "--target", "ort", "--out", tmp_path / "b")
    done = vitrim("compress", "demo", *options, "--device", "ssh://nobody@127.0.0.1:1", "--json", env=cache)
    assert done.code == 3 and "refused" in done.json["error"]["message"] and list(tmp_path.iterdir()) == []


def test_a_cut_connection_is_resumed(server: Server, small: Path) -> None:
    with started(server, "profile", small) as process:
        old = waited(server, process)
        server.cut()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    sent = re.findall(r"sending (\d+) of (\d+) files", err)
    assert len(sent) == 2 and sent[0][0] == sent[0][1] and sent[1][0] == "0"  # nothing is sent twice
    assert "attempt 2 of 3" in err and json.loads(out)["runs"] > 0
    assert not set(old) & set(server.running()) and server.left == []


def test_a_connection_cut_for_good_is_one_sentence(server: Server, small: Path) -> None:
    with started(server, "profile", small) as process:
        while process.poll() is None:
            if server.running():
                server.cut()
            time.sleep(0.01)
        out, err = process.communicate()
    assert process.returncode == 3 and "Traceback" not in err
    assert "cut 3 times" in json.loads(out)["error"]["message"]
    assert server.running() == [] and server.left == []  # cleaning up still got through


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_there(server: Server, small: Path, sign: signal.Signals) -> None:
    with started(server, "profile", small) as process:
        waited(server, process)
        process.send_signal(sign)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and json.loads(out)["error"]["code"] == "Interrupted", err
    settled(lambda: server.running() == [] and server.left == [])


def started(server: Server, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "compressor", *map(str, arguments), "--device", "board", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT_FOLDER,
        env={**os.environ, **server.env},
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - no thread is running
    )


def waited(server: Server, process: subprocess.Popen[str]) -> list[int]:
    """The jobs that run there, once `process` has started any."""
    while not (found := server.running()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found


def settled(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def tiny_disk(server: Server, options: str) -> Iterator[None]:
    """A small file system where temporary folders are made."""
    place = server.home / "tmp"
    mount = ["mount", "-t", "tmpfs", "-o", f"{options},mode=1777", "tmpfs", place]
    if not ROOT or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("options", ["size=1m", "size=64m,nr_inodes=20"])  # seen beforehand; met while unpacking
def test_a_full_disk_there_is_one_sentence_and_leaves_nothing(server: Server, small: Path, options: str) -> None:
    with tiny_disk(server, options):
        done = there(server, "profile", small)
        assert done.code == 3 and "Traceback" not in done.err
        assert "its disk is full" in done.json["error"]["message"] and "\n" not in done.json["error"]["message"]
        assert server.left == []


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("ssh://nobody@127.0.0.1:1", "Connection refused"),
        ("ssh://nobody@no-such-host.invalid", "resolve"),
    ],
)
def test_a_wrong_address_is_one_sentence(server: Server, small: Path, device: str, says: str) -> None:
    done = vitrim("profile", small, "--device", device, "--json", env=server.env)
    error = done.json["error"]
    assert done.code == 3 and says in error["message"] and error["hint"].startswith("Try it by hand: ssh ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("identity", "known", "says"), [("stranger", True, "denied"), ("user", False, "verification")])
def test_a_refused_key_or_unknown_host_is_one_sentence(
    server: Server, small: Path, identity: str, known: bool, says: str
) -> None:
    before = server.env
    done = vitrim("profile", small, "--device", "board", "--json", env=client(server, identity, known=known))
    server.env = before
    assert done.code == 3 and says in done.json["error"]["message"] and "Traceback" not in done.err


def test_what_the_device_lacks_is_one_sentence(server: Server, small: Path, tmp_path: Path) -> None:
    empty = server.home / "empty-python"  # the same Python without its packages
    empty.write_text(f'#!/bin/sh\nexport PYTHONPATH=\nexec {server.python} -S "$@"\n')
    empty.chmod(0o755)
    for python, says in ((empty, "numpy, pillow, pydantic missing"), (server.home / "none", "none")):
        assert vitrim("device", "add", "bare", server.url, "--python", python, env=server.env).code == 0
        done = vitrim("profile", small, "--device", "bare", "--json", env=server.env)
        assert done.code == 3 and says in done.json["error"]["message"], done.json
        assert server.left == []


def test_a_model_is_refused_before_anything_is_contacted(server: Server) -> None:
    done = vitrim("profile", "demo", "--device", "ssh://nobody@127.0.0.1:1", "--json")
    assert done.code == 2 and "vitrim compress demo" in done.json["error"]["hint"]


def test_names_that_a_shell_would_run_are_only_names(server: Server, small: Path, tmp_path: Path) -> None:
    odd = tmp_path / "b; touch $(pwd)-'x' `id` \n"
    shutil.copytree(small, odd)
    (odd / "a'; touch owned; '").write_text("x")
    content = json.loads((odd / "manifest.json").read_text())
    seal(odd, {key: value for key, value in content.items() if key not in ("schema", "files")})
    done = there(server, "verify", odd)
    assert done.code == 0, done.err
    assert server.left == [] and list(server.home.rglob("owned")) == []


def test_what_is_needed_here_is_one_sentence(small: Path, tmp_path: Path) -> None:
    for device, tool in (("adb://X1", "adb"), ("ssh://board", "ssh")):
        done = vitrim("profile", small, "--device", device, "--json", env={"PATH": str(tmp_path)})
        assert done.code == 3 and done.json["error"]["hint"] == f"Install {tool}."
