"""Which CPUs a measurement runs on: those a device would give its model, and not the ones others are busy on."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import sleep

__all__ = ["busy_shares", "pinned", "preferred"]

ROOT = Path("/")
LOOK_S = 0.1  # ten of the kernel's ticks
BUSY = 0.5  # share of the time from which a CPU is left to others


@contextmanager
def pinned(cpus: int) -> Iterator[None]:
    """Restrict this process to the `cpus` allowed CPUs that `preferred` puts first, so that the scheduler does not move it.

    Processes started meanwhile inherit them. Where the system has no affinity, or allows no more CPUs than that, nothing
    is changed. Threads a runtime started before keep their own affinity.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(allowed) <= cpus:
        yield
        return
    os.sched_setaffinity(0, preferred(allowed, busy_shares())[:cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def preferred(allowed: Collection[int], busy: Mapping[int, float], *, root: Path = ROOT) -> list[int]:
    """`allowed` CPUs, the best to measure on first.

    The first thread of every core comes before second ones, which would share it; fast cores before slow ones (a Rockchip
    RK3588 counts its small cores first); then those that are not busy, so that two measurements do not meet on CPU 0.

    Args:
        allowed: CPU numbers.
        busy: share of the time that others use a CPU, see `busy_shares`.
        root: file system root, for tests.
    """
    cores = {cpu: _core(cpu, root) for cpu in allowed}

    def rank(cpu: int) -> tuple[int, int, bool, int]:
        sibling = sum(cores[other] == cores[cpu] for other in allowed if other < cpu)
        return sibling, -_speed(cpu, root), busy.get(cpu, 0.0) > BUSY, cpu

    return sorted(allowed, key=rank)


def busy_shares(*, root: Path = ROOT) -> dict[int, float]:
    """Share of `LOOK_S` from now that each CPU is used; empty where /proc/stat cannot be read."""
    before = _ticks(root)
    if not before:
        return {}
    sleep(LOOK_S)
    found = {}
    for cpu, after in _ticks(root).items():
        passed = [b - a for a, b in zip(before.get(cpu, after), after, strict=True)]
        total = sum(passed)
        found[cpu] = 1 - (passed[3] + passed[4]) / total if total > 0 else 0.0  # idle, and waiting for a disk
    return found


def _ticks(root: Path) -> dict[int, list[int]]:
    """By CPU: user nice system idle iowait irq softirq steal."""
    try:
        text = (root / "proc/stat").read_text()
    except OSError:
        return {}
    rows = re.findall(r"^cpu(\d+)((?: \d+){8})", text, re.MULTILINE)
    return {int(cpu): [int(word) for word in words.split()] for cpu, words in rows}


def _core(cpu: int, root: Path) -> tuple[str, str]:
    """Package and core that `cpu` is a thread of; where it is not told, a core of its own."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return "", f"cpu{cpu}"


def _speed(cpu: int, root: Path) -> int:
    """What the kernel says of a core's speed, comparable on one machine: capacity (Arm), highest frequency, or 0."""
    folder = root / f"sys/devices/system/cpu/cpu{cpu}"
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):
            continue
    return 0
