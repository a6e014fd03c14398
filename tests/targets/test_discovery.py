"""A target is one file or one installed entry point; nothing else is edited to add one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import targets

PLUGIN = """
    from compressor.types import Artifact, Availability, Capabilities
    NAME = {name!r}
    CAPABILITIES = Capabilities("tokens", 20, ("fp32",))
    def available(): return Availability(available=True, version="1")
    def build(graph, options): ...
    {last}
"""


def ask(folder: Path, code: str) -> str:
    """What a fresh interpreter prints or says last, with `folder` as an installed package's place."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); import targets; {code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def install(folder: Path, name: str, last: str = "def open(artifact, threads=1): ...") -> Path:
    """A distribution whose entry point in ``vitrim.targets`` is a module with a target called `name`."""
    (folder / "my_chip.py").write_text(textwrap.dedent(PLUGIN).format(name=name, last=last))
    info = folder / "my_chip-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-chip\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vitrim.targets]\nmy_chip = my_chip\n")
    return folder


def test_an_installed_package_adds_a_target(tmp_path):
    assert "mychip" in ask(install(tmp_path, "mychip"), "print(targets.names())")
    assert "mychip" not in targets.names()
    (tmp_path / "empty").mkdir()
    assert "mychip" not in ask(tmp_path / "empty", "print(targets.names())")


def test_two_targets_of_one_name_are_an_error(tmp_path):
    said = ask(install(tmp_path, "ort"), "targets.names()")
    assert "names must be unique, got 'ort' twice, the second from entry point my_chip = my_chip" in said


def test_an_incomplete_target_is_an_error(tmp_path):
    said = ask(install(tmp_path, "mychip", last=""), "targets.names()")
    assert "my_chip must define NAME, CAPABILITIES, available, build and open, got no open" in said


def test_a_target_that_does_not_load_stops_no_other(tmp_path):
    package = install(tmp_path, "mychip")
    state = "s = targets.get('my_chip').available(); print(s.available, s.reason)"
    (tmp_path / "my_chip.py").write_text("import a_module_that_is_not_there\n")
    assert {"ort", "my_chip"} <= set(ask(package, "print(*targets.names())").split())
    said = ask(package, state)
    assert said == "False my_chip does not load: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert "TargetUnavailable: Target 'my_chip': my_chip does not load" in ask(
        package, "targets.get('my_chip').open(0)"
    )


@pytest.mark.parametrize("name", targets.names())
def test_the_name_is_the_modules_own(name):
    assert name == targets.get(name).NAME
