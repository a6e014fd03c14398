"""Which CPUs are measured on: on made-up machines, and on this one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from compressor.affinity import busy_shares, pinned, preferred


def machine(root: Path, cores: Iterable[tuple[int, int]], speed: str = "cpu_capacity") -> Path:
    """A file system that tells core and speed of every CPU, one after the other."""
    for cpu, (core, value) in enumerate(cores):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology/physical_package_id").write_text("0\n")
        (folder / "topology/core_id").write_text(f"{core}\n")
        (folder / speed).parent.mkdir(exist_ok=True)
        (folder / speed).write_text(f"{value}\n")
    return root


def test_the_large_cores_of_a_phone_chip_come_first(tmp_path: Path) -> None:
    rk3588 = machine(tmp_path, [*((i, 414) for i in range(4)), *((i, 1024) for i in range(4, 8))])
    assert preferred(range(8), {}, root=rk3588) == [4, 5, 6, 7, 0, 1, 2, 3]
    assert preferred({0, 1, 2, 3}, {}, root=rk3588) == [0, 1, 2, 3]  # what is not allowed is not taken


def test_two_threads_get_two_cores(tmp_path: Path) -> None:
    siblings = machine(tmp_path, [(0, 3000), (0, 3000), (1, 3000), (1, 3000)], "cpufreq/cpuinfo_max_freq")
    assert preferred(range(4), {}, root=siblings) == [0, 2, 1, 3]


def test_second_threads_of_fast_cores_come_after_slow_cores(tmp_path: Path) -> None:
    hybrid = machine(tmp_path, [(0, 5000), (0, 5000), (1, 4000), (2, 4000)], "cpufreq/cpuinfo_max_freq")
    assert preferred(range(4), {}, root=hybrid) == [0, 2, 3, 1]


def test_a_busy_cpu_is_left_to_others_unless_it_is_faster(tmp_path: Path) -> None:
    assert preferred(range(3), {0: 0.9, 1: 0.4}, root=tmp_path) == [1, 2, 0]  # nothing is told of these cores
    chip = machine(tmp_path, [(0, 414), (1, 1024), (2, 1024)])
    assert preferred(range(3), {1: 1.0}, root=chip) == [2, 1, 0]
    assert preferred(range(3), {1: 1.0, 2: 1.0}, root=chip) == [1, 2, 0]


def test_busy_shares_are_those_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "proc/stat"
    stat.parent.mkdir()
    stat.write_text("cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 10 0 10 80 0 0 0 0 0 0\ncpu1 50 0 0 50 0 0 0 0 0 0\nintr 1 2\n")
    later = "cpu0 10 0 11 88 1 0 0 0 0 0\ncpu1 59 0 0 51 0 0 0 0 0 0\n"
    monkeypatch.setattr("compressor.affinity.sleep", lambda _: stat.write_text(later))
    assert busy_shares(root=tmp_path) == pytest.approx({0: 0.1, 1: 0.9})
    assert busy_shares(root=tmp_path / "none") == {}


def test_pinned_gives_the_cpus_back() -> None:
    allowed = os.sched_getaffinity(0)
    with pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_what_is_started_meanwhile_inherits_the_cpus() -> None:
    with pinned(1), multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(os.sched_getaffinity, (0,)) == os.sched_getaffinity(0)
