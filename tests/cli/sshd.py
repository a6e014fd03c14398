"""A device for the tests: a real sshd on loopback with its own host key, user key and, where root, a restricted user."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import vitrim
from tests.core.test_build_plan import PLUGIN

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
ROOT = os.geteuid() == 0


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


@contextlib.contextmanager
def device_server() -> Iterator[Server]:
    """A server, its user, its keys, and "board" in the inventory of its clients; all of it gone afterwards."""
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
