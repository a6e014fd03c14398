"""Jobs on another machine: a real sshd on loopback, see `tests.cli.sshd`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor import checkpoint
from compressor.bundle import Bundle
from compressor.candidates import build
from compressor.manifest import artifact_entry, seal
from compressor.types import BuildOptions
from tests.cli.conftest import ROOT as ROOT_FOLDER
from tests.cli.conftest import Done, vitrim
from tests.cli.sshd import ROOT, SSHD, Server, client, device_server
from tests.cli.test_errors import heed_interrupts
from tests.core.test_build_plan import bundle as planned_bundle
from tests.targets.networks import PLAIN, model, pixels, pruned

pytestmark = [
    pytest.mark.skipif(SSHD is None, reason="no sshd is installed (Debian: openssh-server)"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh is installed (Debian: openssh-client)"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with device_server() as running:
        yield running


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


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
