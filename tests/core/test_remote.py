"""How devices are addressed and named, and what is believed of their answers; the jobs themselves: tests/cli/test_remote.py."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from compressor import inventory, remote, replies
from compressor.device import fingerprint
from compressor.errors import BundleError, ConfigError, TargetUnavailable
from compressor.inventory import Device
from compressor.probe import MARK
from compressor.profile_json import to_json
from compressor.remote import FOLDER, NOT_SENT, _code
from compressor.transport import transport
from compressor.types import OpRecord, Profile


def test_ssh_is_told_where_and_never_to_ask():
    command = transport("ssh://pi@board.local:2222").command("cat 'a b'")
    assert command[:2] == ["ssh", "-T"] and command[-5:-2] == ["2222", "-l", "pi"] and "BatchMode=yes" in command
    assert command[-2] == "board.local" and shlex.split(command[-1]) == ["exec", "sh", "-c", "cat 'a b'"]
    assert "-p" not in transport("ssh://board").command("true") and "-l" not in transport("ssh://board").command("true")
    assert transport("ssh://[::1]:22").command("true")[-2] == "::1"


@pytest.mark.parametrize("host", ["RDK-X5", "board", "FE80::1"])
def test_the_host_is_as_it_was_typed(host):
    """Patterns of Host in ssh_config know capitals: in lower case an alias is another name, which does not resolve."""
    shown = f"[{host}]" if ":" in host else host
    for url in (f"ssh://{shown}", f"ssh://Root@{shown}:22"):
        there = transport(url)
        assert there.command("true")[-2] == host and there.by_hand.endswith(f"{host} true")


def test_adb_is_told_which_device():
    there = transport("adb://emulator-5554")
    assert there.command("true") == ["adb", "-s", "emulator-5554", "shell", "-T", "exec sh -c true"]
    assert transport("adb://192.168.1.5:5555").command("true")[2] == "192.168.1.5:5555"
    daemon = "* daemon not running; starting now at tcp:5037\n* daemon started successfully\n"  # adb 29's own words
    assert there.lost(1, f"{daemon}error: device 'x' not found\n") and there.lost(1, "adb: device offline")
    assert not there.lost(1, "sh: python3: not found") and not there.lost(0, "adb: warning")


@pytest.mark.parametrize("text", ["a b", "$(id)", "`id`", "'; echo no; '", "a\\b", "!x", '"'])
def test_quoting_survives_two_shells(text):
    script = transport("ssh://board").command(f"printf %s {shlex.quote(text)}")[-1]
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == text


@pytest.mark.parametrize(
    "url",
    [
        *(
            "board",
            "http://board",
            "ssh://",
            "ssh://-oProxyCommand=id",
            "ssh://board/path",
            "ssh://board?x=1",
            "ssh://a b",
        ),
        *(
            "ssh://-l@board",
            "ssh://pi@board:99999",
            "ssh://pi@board:x",
            "ssh://$(id)",
            "adb://",
            "adb://-x",
            "adb://a;b",
        ),
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="device must be"):
        transport(url)


@pytest.mark.parametrize(
    "url",
    [
        *("ssh://pi:hunter2@board", "ssh://pi:hunter2@[::1", "ssh://pi:a@hunter2@board", "http://pi:hunter2@board/x"),
        *("pi:hunter2@board", "ssh://pi:hunter2@board:x", "ssh://:hunter2@board", "ssh://pi:a://hunter2@board"),
    ],
)
def test_a_password_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        transport(url)
    assert "hunter2" not in f"{caught.value} {caught.value.hint}" and ":...@" in str(caught.value)


def test_an_address_without_a_password_is_repeated_as_it_was():
    with pytest.raises(ConfigError, match=r"got 'ssh://pi@board:x'\."):
        transport("ssh://pi@board:x")


def test_inventory_keeps_what_was_added(tmp_path):
    file = tmp_path / "vitrim" / "devices.json"
    assert inventory.listed(file) == {}
    inventory.add(file, "pi", inventory.device("ssh://pi@board"))
    inventory.add(file, "phone", inventory.device("adb://X1", "/data/python"))
    assert list(inventory.listed(file)) == ["phone", "pi"]
    assert inventory.resolve("pi", file) == inventory.Device(url="ssh://pi@board", python="python3")
    assert inventory.resolve("local", file) is None and inventory.resolve(None, file) is None
    assert inventory.resolve("ssh://x", file) == inventory.Device(url="ssh://x")
    inventory.remove(file, "pi")
    with pytest.raises(ConfigError, match="must be a URL, or one of local, phone, got 'pi'"):
        inventory.resolve("pi", file)
    with pytest.raises(ConfigError, match="got 'pi'"):
        inventory.remove(file, "pi")
    assert [p.name for p in file.parent.iterdir()] == ["devices.json"]


@pytest.mark.parametrize("name", ["", "local", "-x", "a b", "a/b", "../a", "x" * 64])
def test_names_that_could_be_something_else_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="device"):
        inventory.add(tmp_path / "devices.json", name, inventory.device("ssh://board"))
    assert not (tmp_path / "devices.json").exists()


def test_a_python_that_is_an_option_is_refused():
    with pytest.raises(ConfigError, match="python is not valid"):
        inventory.device("ssh://board", "-c")


def test_a_damaged_inventory_is_one_sentence(tmp_path):
    file = tmp_path / "devices.json"
    file.write_text('{"schema": 1, "devices": {"a": {"url": "ssh://b", "password": "x"}}}')
    with pytest.raises(ConfigError, match=r"devices\.a\.password is not valid"):
        inventory.listed(file)


ASKED = {"target": ("ort", "null"), "threads": (1,), "batch": (1,)}


def answer() -> dict:
    """What a device answers to a profile."""
    op = OpRecord("blocks.0.fc1", "MatMul", "CPU", "fp32", 0.5)
    found = Profile("ort", (1_000_000, 2_000_000, 9_000_000), 5, 1, 1, 1.0, 2.0, 3, fingerprint(), (op,), {}, (1, 2))
    return json.loads(json.dumps({"precision": "fp32", **to_json(found), "parts": []}))


def test_a_profile_is_taken_over():
    assert replies.profile(answer(), ASKED) == answer()


@pytest.mark.parametrize("asked", [{"target": ("openvino",)}, {"threads": (2,)}, {"batch": (8,)}])
def test_a_profile_of_something_else_is_refused(asked):
    with pytest.raises(TargetUnavailable, match=f"{next(iter(asked))} must be .*, got"):
        replies.profile(answer(), {**ASKED, **asked})


def test_percentiles_are_computed_here():
    assert replies.profile({**answer(), "latency_ms": {"p50": 0.001}}, ASKED)["latency_ms"]["p50"] == 2.0


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"samples_ns": []},
            {"samples_ns": [1.5]},
            {"samples_ns": [-1]},
            {"samples_ns": [10**400]},
            {"load_ms": 1e300},
            {"precision": "fp31"},
            {"ops": [{}]},
            {"x": 1},
        ),
        *(
            {"parts": [{"part": "fc1"}]},
            {"load_ms": -1.0},
            {"device": []},
            {"throughput": {"streams": 0}},
            {"threads": "1"},
        ),
    ],
)
def test_a_profile_that_is_none_is_refused(change):
    with pytest.raises(TargetUnavailable, match="answer is not valid"):
        replies.profile({**answer(), **change}, ASKED)


def check(**change) -> dict:
    """What a device answers to a verification."""
    found = {"target": "ort", "passed": True, "max_abs": 0.0, "tolerance": 0.1} | change
    kept = {key: value for key, value in found.items() if value != "left out"}
    return {"bundle": "b", "passed": True, "files": 3, "signature": None, "targets": [kept]}


def test_a_verification_is_taken_over():
    assert replies.checks(check(), ["ort"]) == check()["targets"]
    skipped = {"target": "trt", "passed": None, "skipped": "not installed"}
    assert replies.checks({**check(), "targets": [skipped]}, ["trt"]) == [skipped]


@pytest.mark.parametrize(
    "change",
    [{"max_abs": "left out"}, {"tolerance": "left out"}, {"max_abs": 10**400}, {"passed": None}, {"target": "trt"}],
)
def test_a_verification_that_is_none_is_refused(change):
    with pytest.raises(TargetUnavailable, match="answer is not valid"):
        replies.checks(check(**change), ["ort"])


def test_a_verification_of_fewer_targets_is_refused():
    with pytest.raises(TargetUnavailable, match=r"targets must be \['ort', 'trt'\], got \['ort'\]"):
        replies.checks(check(), ["ort", "trt"])


def engine(**change) -> dict:
    """What a device answers to a build."""
    ms = {"min": 1.0, "p50": 1.5, "p90": 2.0, "p99": 2.0, "mean": 1.5}
    row = {"precision": "fp32", "size_bytes": 9, "latency_ms": ms, "samples_ns": [1_000_000, 2_000_000]}
    rows = [{**row, "agreement": 100.0, "settings": {"stage": "engine"}, "kept": True}]
    found = {"bundle": "b", "target": "trt", "precision": "fp32", "latency_ms": ms, "reason": "the only one"}
    return {**found, "candidates": rows, "batch": 1, "refused": {}, "device": {}, **change}


def test_a_build_is_taken_over():
    assert replies.built(engine(), {"target": ("trt",)}) == engine()


@pytest.mark.parametrize(
    "change",
    [
        *({"latency_ms": {"mean": 1.0}}, {"latency_ms": {**engine()["latency_ms"], "p50": 10**400}}),
        *({"target": "ort"}, {"candidates": [{}]}, {"precision": "fp31"}, {"device": []}),
    ],
)
def test_a_build_that_is_none_is_refused(change):
    with pytest.raises(TargetUnavailable, match="answer is not valid"):
        replies.built(engine(**change), {"target": ("trt",)})


def test_only_the_last_marked_line_is_read_and_cleaned():
    text = 'Welcome\n{"a": 0}\n' + MARK + '{"a": "x\\u001b[2J\\u202e", "b": [1]}\nbye'
    assert replies.marked(text) == {"a": "x?[2J?", "b": [1]}
    assert replies.marked("Welcome\n") is None


@pytest.mark.parametrize("line", ["{", "[1]", '{"a": NaN}', f'{{"a": [-1{"0" * 400}]}}', '{"a": 1e999}', "[" * 100_000])
def test_an_answer_that_is_no_object_is_refused(line):
    with pytest.raises(TargetUnavailable, match="answer must be"):
        replies.marked(MARK + line)


def test_a_failure_is_the_class_it_was_and_never_another():
    said = {"code": "BundleError", "message": "b: broken.", "hint": "Copy it."}
    failed = replies.failure(said, "ssh://board")
    assert type(failed) is BundleError and str(failed) == "ssh://board: b: broken." and failed.hint == "Copy it."
    for code in ("unknown_name", "difflib", "__class__", "SystemExit"):
        assert type(replies.failure({**said, "code": code}, "x")) is TargetUnavailable


def test_of_endless_complaints_only_the_last_words_are_kept(tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"  # of a device that writes 20 MB of complaints
    ssh.write_text("#!/bin/sh\nyes complaint | head -c 20000000 >&2\necho its last words >&2\nexit 1\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    kept = []
    text = remote._Tail.text
    monkeypatch.setattr(remote._Tail, "text", lambda tail: kept.append(text(tail)) or kept[-1])
    with pytest.raises(TargetUnavailable, match="failed: its last words"), remote.Remote(Device(url="ssh://b"), print):
        pass
    assert [len(said) for said in kept] == [remote.TAIL_BYTES]


@pytest.mark.parametrize("path", ["/tmp/vitrim-abc;id", "/tmp/$(id)/vitrim-abc", "tmp/vitrim-abc", "/tmp/other", "/"])
def test_a_folder_that_is_not_plain_is_refused(path):
    assert FOLDER.fullmatch("/tmp/vitrim-aB3_x") and not FOLDER.fullmatch(path)


def test_what_is_sent_is_sources_only():
    sent = _code()
    assert {"code/compressor/runner.py", "code/targets/ort.py", "code/calibration/data.py"} <= sent.keys()
    assert all(name.endswith(".py") and not NOT_SENT & set(name.split("/")) for name in sent)
    assert all(Path(file.path).stat().st_size == file.size for file in sent.values())
