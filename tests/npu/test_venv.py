"""Environments of vendor tools, tried with one that needs no vendor: Python alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compressor.errors import TargetUnavailable
from targets import _venv
from targets._venv import Limits, Recipe, Worker, availability, find_python, install

ROOT = Path(__file__).parents[2]
RECIPE = Recipe("plain", "", (), module="extra", package="pip", files={"extra.py": "WORD = 'carried'\n"})
SCRIPT = """
import os, sys, time
def echo(arguments, arrays):
    import extra
    print("the tool chats on stdout")
    import tempfile
    return {"word": extra.WORD, "got": arguments, "prefix": sys.prefix, "left": tempfile.mkdtemp()}, {}
def fail(arguments, arrays):
    raise ValueError("node blocks.0.softmax is odd")
def crash(arguments, arrays):
    print("bad pass: rule_7", flush=True)
    os.abort()
def sleep(arguments, arrays):
    time.sleep(60)
def spawn(arguments, arrays):
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    with open(arguments["pids"] + ".part", "w") as f:
        f.write(f"{os.getpid()} {child.pid}")
    os.rename(arguments["pids"] + ".part", arguments["pids"])
    sum(range(10**12))  # holds the interpreter's lock, as compiled tools do
def swallow(arguments, arrays):
    return {"n": len(bytearray(1 << 31))}, {}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(root))
        said: list[str] = []
        install(RECIPE, said.append)
        assert any("installed in" in line for line in said)
        yield root


@pytest.fixture
def worker(home, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(**limits: float) -> Worker:
        bounds = Limits(**limits)  # type: ignore[arg-type]
        return Worker(RECIPE, script, tmp_path / "tool.log", bounds, {"rule_7": "Disable rule 7."})

    return make


def test_an_environment_is_installed_once_and_found_again(home):
    assert availability(RECIPE).available
    said: list[str] = []
    install(RECIPE, said.append)
    assert said == [f"plain: already installed in {home / 'vitrim' / 'venvs' / 'plain'}"]


def test_an_environment_of_another_recipe_is_not_taken_for_this_one(home):
    other = Recipe("plain", "", (("numpy",),), module="extra", package="pip")
    state = availability(other)
    assert not state.available and "another version of vitrim" in state.reason
    assert state.fix == "vitrim doctor --install plain"


def test_a_worker_answers_from_its_own_environment_and_its_prints_are_the_log(worker, home):
    with worker() as tool:
        reply, arrays = tool.call("echo", {"a": 1})
        assert reply["word"] == "carried" and reply["got"] == {"a": 1} and arrays == {}
        assert Path(reply["prefix"]) == home / "vitrim" / "venvs" / "plain"
        assert tool.call("echo", {"a": 2})[0]["got"] == {"a": 2}
        assert Path(reply["left"]).is_dir()
    assert not Path(reply["left"]).exists()  # nor anything else the tool forgot
    assert "the tool chats on stdout" in tool.log.read_text()


def test_a_failure_a_crash_and_a_hang_are_one_sentence_each(worker):
    with worker() as tool:
        with pytest.raises(
            TargetUnavailable, match=r"pip: 'fail' must succeed, got ValueError: node blocks\.0\.softmax"
        ):
            tool.call("fail", {})
        assert tool.call("echo", {})[0]["word"] == "carried"  # the process lives on
        with pytest.raises(TargetUnavailable, match="ended with signal SIGABRT") as caught:
            tool.call("crash", {})
        assert caught.value.hint.startswith("Disable rule 7. Its log is ")
    with worker(seconds=0.5) as tool, pytest.raises(TargetUnavailable, match=r"no answer within 0\.5 s"):
        tool.call("sleep", {})


OWNER = """
import sys, threading
from pathlib import Path
from targets._venv import Worker
from tests.npu.test_venv import RECIPE
made = []
thread = threading.Thread(target=lambda: made.append(Worker(RECIPE, Path(sys.argv[1]))))
thread.start()
thread.join()  # the thread that started the worker has ended; the worker has not
assert made[0].call("echo", {"a": 1})[0]["got"] == {"a": 1}
made[0].call("spawn", {"pids": sys.argv[2]})
"""


def alive(pid: str) -> bool:
    """Whether the process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_a_worker_and_what_it_started_end_with_their_owner_even_when_killed(home, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    pids, scratch = tmp_path / "pids", tmp_path / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-c", OWNER, tmp_path / "script.py", pids]
    owner = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)})
    try:
        assert within(30, pids.exists)
        started = pids.read_text().split()
        assert all(alive(pid) for pid in started)
    finally:
        owner.kill()
        owner.wait()
    within(10, lambda: not any(alive(pid) for pid in started))
    left = [pid for pid in started if alive(pid)]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


def test_a_log_that_ends_with_the_worker_is_quoted_and_not_named(home, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + 'def odd(arguments, arrays):\n    print("layer 3 is odd")\n    raise ValueError("no")\n')
    with Worker(RECIPE, script, known={"is odd": "Make it even."}) as tool:
        with pytest.raises(TargetUnavailable, match="got ValueError: no") as caught:
            tool.call("odd", {})
        assert caught.value.hint == "Make it even. Its last words: layer 3 is odd"
    with Worker(RECIPE, script, tmp_path / "kept.log") as tool:
        with pytest.raises(TargetUnavailable) as caught:
            tool.call("odd", {})
        assert caught.value.hint == f"Its log is {tmp_path / 'kept.log'}."


def test_memory_is_limited(worker):
    with worker(memory_bytes=1 << 30) as tool, pytest.raises(TargetUnavailable, match="MemoryError"):
        tool.call("swallow", {})
    with worker() as tool:  # the limit, not the call, was what failed
        assert tool.call("swallow", {})[0]["n"] == 1 << 31


def test_arrays_survive_the_journey(home, tmp_path):
    """Needs NumPy in the environment: the current one's is borrowed through a .pth file, to download nothing."""
    site = _venv._site(RECIPE)
    (site / "borrowed.pth").write_text(str(Path(np.__file__).parents[1]))
    script = tmp_path / "double.py"
    script.write_text("def double(arguments, arrays):\n    return {}, {k: 2 * v for k, v in arrays.items()}\n")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Worker(RECIPE, script, tmp_path / "log") as tool:
        assert np.array_equal(tool.call("double", {}, {"x": x})[1]["x"], 2 * x)


def test_a_missing_python_is_said_with_what_to_do(tmp_path):
    with pytest.raises(TargetUnavailable, match=r"Python 3\.99 must be installed"):
        find_python("3.99")


def test_a_pip_failure_names_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    bad = Recipe("bad", "", (("--no-index", "there-is-no-such-package"),), module="json", package="pip")
    with pytest.raises(TargetUnavailable, match="must install, got") as caught:
        install(bad, lambda line: None)
    assert "no-such-package" in (tmp_path / "vitrim" / "venvs" / "bad.log").read_text()
    assert str(tmp_path) in caught.value.hint and not availability(bad).available
