"""What this machine is, and what it did during a measurement. Reads /proc and /sys only; what cannot be read is absent.

A value that is absent was not readable here: a missing governor, temperature or energy counter is never replaced by a
guess.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compressor

__all__ = [
    "Counters",
    "QueueClock",
    "conditions",
    "fingerprint",
    "identity",
    "peak_rss_bytes",
    "read_counters",
]

ROOT = Path("/")
# CPU features that decide which kernels a runtime picks; the full flag list only adds noise to a report.
FEATURES = (
    *(
        "sse4_1",
        "sse4_2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
    ),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
# What makes two measurements comparable. Frequency and temperature drift on one machine, versions are compared
# separately, and a measurement pins itself to as many CPUs as it has threads, which are recorded beside it.
IDENTITY = ("machine", "system", "cpu", "governor", "limits")


def fingerprint(versions: Mapping[str, str] | None = None, *, root: Path = ROOT) -> dict[str, Any]:
    """This machine as a JSON-ready dict; a key is absent where its source is not readable.

    Args:
        versions: runtime versions to record, by name, e.g. ``{"onnxruntime": "1.31.0"}``.
        root: file system root, for tests.

    Returns:
        ``machine, system, kernel, cpu{model, features, logical, physical}, memory_bytes, governor, frequency_mhz,
        temperature_c, affinity, limits{cpus, memory_bytes}, versions, id``; ``id`` is `identity` of the rest.
    """
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": platform.release(),
        "cpu": _cpu(root),
        "memory_bytes": _meminfo(root),
        "governor": _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "frequency_mhz": _frequency(root),
        "temperature_c": _temperature(root),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "limits": _limits(root),
        "versions": {"vitrim": compressor.__version__, "python": platform.python_version(), **(versions or {})},
    }
    present = {key: value for key, value in found.items() if value is not None and value != {}}
    return {**present, "id": identity(present)}


def identity(device: Mapping[str, Any]) -> str:
    """Twelve hex digits that are equal when latencies measured on two devices may be compared.

    >>> one = {"machine": "x86_64", "cpu": {"model": "A"}, "temperature_c": 40.0}
    >>> identity(one) == identity({**one, "temperature_c": 70.0}), identity(one) == identity({**one, "cpu": {}})
    (True, False)
    """
    same = {key: device[key] for key in IDENTITY if key in device}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]


def peak_rss_bytes(*, root: Path = ROOT) -> int:
    """Peak resident memory of this process, 0 where not readable.

    VmHWM and not getrusage: ru_maxrss survives exec, so a child started by a large process would report its parent's
    peak.
    """
    return _kib(root / "proc/self/status", "VmHWM") or 0


# --------------------------------------------------------------------------- during a run


class QueueClock:
    """Nanoseconds this thread has spent ready to run while no CPU was given to it; 0 for ever where not readable.

    This is what other processes' load adds to a latency on a shared machine, in steps of the scheduler's time slice.
    Linux counts it exactly (second field of schedstat); time taken by a hypervisor is not in it.
    """

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:  # Not Linux, or not told: then nothing is subtracted
            self._file = None

    def __call__(self) -> int:
        """The counter now; about 2 us."""
        return 0 if self._file is None else int(os.pread(self._file, 64, 0).split()[1])

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            os.close(self._file)

    def __enter__(self) -> QueueClock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Counters:
    """Cumulative counters of machine and process; the difference of two says what happened in between."""

    ticks: tuple[int, ...] = ()  # /proc/stat cpu line: user nice system idle iowait irq softirq steal
    own_ticks: int = 0  # user + system of this process and the children it waited for
    involuntary: int = 0  # times this process was taken off a CPU
    waited_ns: int = 0  # time this thread was ready to run but had no CPU
    throttled_us: int | None = None  # container CPU quota
    energy_uj: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # package -> (counter, wrap-around)
    frequency_mhz: float | None = None
    temperature_c: float | None = None


def read_counters(*, root: Path = ROOT) -> Counters:
    """The counters now."""
    fields = (_text(root / "proc/stat") or "").partition("\n")[0].split()[1:9]
    stat = (_text(root / "proc/self/stat") or "").rpartition(")")[2].split()
    return Counters(
        ticks=tuple(int(value) for value in fields),
        own_ticks=sum(int(value) for value in stat[11:15]),  # utime stime cutime cstime, counted after the command name
        involuntary=_number(_field(root / "proc/self/status", "nonvoluntary_ctxt_switches")) or 0,
        waited_ns=int((_text(root / "proc/thread-self/schedstat") or "0 0").split()[1]),
        throttled_us=_number(_field(root / "sys/fs/cgroup/cpu.stat", "throttled_usec")),
        energy_uj=_energy(root),
        frequency_mhz=_frequency(root),
        temperature_c=_temperature(root),
    )


def conditions(before: Counters, after: Counters, *, runs: int) -> dict[str, Any]:
    """What the machine did between two readings; keys are absent where the source is.

    Args:
        before: counters at the start.
        after: counters at the end.
        runs: inferences in between, for energy per inference.

    Returns:
        ``steal_share`` (time taken by the hypervisor) and ``others_share`` (time taken by other processes), both as a
        share of all CPU time; ``involuntary_switches``, ``waited_ms`` (ready, but without a CPU), ``throttled_ms``,
        ``energy_mj_per_run`` (whole package, others' work included), ``frequency_mhz`` and ``temperature_c`` as
        [before, after].
    """
    found: dict[str, Any] = {
        "involuntary_switches": after.involuntary - before.involuntary,
        "waited_ms": (after.waited_ns - before.waited_ns) / 1e6,
    }
    ticks = [b - a for a, b in zip(before.ticks, after.ticks, strict=True)]
    if (total := sum(ticks)) > 0:
        busy = total - ticks[3] - ticks[4] - ticks[7]
        found["steal_share"] = round(ticks[7] / total, 4)
        found["others_share"] = round(max(0, busy - (after.own_ticks - before.own_ticks)) / total, 4)
    if before.throttled_us is not None and after.throttled_us is not None:
        found["throttled_ms"] = (after.throttled_us - before.throttled_us) / 1e3
    if after.energy_uj and before.energy_uj.keys() == after.energy_uj.keys() and runs > 0:
        spent = [(end - before.energy_uj[name][0]) % wrap for name, (end, wrap) in after.energy_uj.items()]
        found["energy_mj_per_run"] = sum(spent) / 1e3 / runs
    for name in ("frequency_mhz", "temperature_c"):
        pair = [getattr(before, name), getattr(after, name)]
        if None not in pair:
            found[name] = pair
    return found


# --------------------------------------------------------------------------- sources


def _text(path: Path) -> str | None:
    """Stripped content of a small file, None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except (
        OSError
    ):  # Absent, or present and refused (energy counters need rights in recent kernels): both mean "not readable"
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def _field(path: Path, name: str) -> str | None:
    """First word after `name` in a file of "name: value" or "name value" lines."""
    for line in (_text(path) or "").splitlines():
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[0] == name:
            return words[1]
    return None


def _kib(path: Path, name: str) -> int | None:
    value = _number(_field(path, name))
    return None if value is None else value * 1024


def _meminfo(root: Path) -> int | None:
    return _kib(root / "proc/meminfo", "MemTotal")


def _cpu(root: Path) -> dict[str, Any]:
    """Model, features and core counts from /proc/cpuinfo (x86 and Arm spell them differently)."""
    rows = [line.partition(":") for line in (_text(root / "proc/cpuinfo") or "").splitlines()]
    table: dict[str, list[str]] = {}
    for key, _, value in rows:
        table.setdefault(key.strip().lower(), []).append(value.strip())
    flags = set(next((table[k][0] for k in ("flags", "features") if k in table), "").split())
    model = next((table[k][0] for k in ("model name", "hardware", "cpu part") if k in table), platform.processor())
    found: dict[str, Any] = {"model": model, "features": [f for f in FEATURES if f in flags], "logical": os.cpu_count()}
    cores = set(zip(table.get("physical id", []), table.get("core id", []), strict=False))
    return {**found, "physical": len(cores)} if cores else found


def _frequency(root: Path) -> float | None:
    """Mean current frequency over CPUs, MHz; None where the kernel does not report it (typical of virtual machines)."""
    paths = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    khz = [value for path in paths if (value := _number(_text(path))) is not None]
    return round(sum(khz) / len(khz) / 1e3, 1) if khz else None


def _temperature(root: Path) -> float | None:
    """Hottest thermal zone in degrees Celsius."""
    paths = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    milli = [value for path in paths if (value := _number(_text(path))) is not None]
    return max(milli) / 1e3 if milli else None


def _limits(root: Path) -> dict[str, Any]:
    """Container limits (cgroup v2, else v1); empty when there are none."""
    group = root / "sys/fs/cgroup"
    found: dict[str, Any] = {}
    quota = (_text(group / "cpu.max") or "").split() or [
        _text(group / "cpu/cpu.cfs_quota_us") or "max",
        _text(group / "cpu/cpu.cfs_period_us") or "100000",
    ]
    allowed, period = _number(quota[0]), _number(quota[-1])
    if allowed is not None and period is not None and allowed > 0 and period > 0:
        found["cpus"] = round(allowed / period, 3)
    memory = _number(_text(group / "memory.max") or _text(group / "memory/memory.limit_in_bytes"))
    if memory is not None and memory < 2**60:  # v1 spells "no limit" as a number near 2^63
        found["memory_bytes"] = memory
    return found


def _energy(root: Path) -> dict[str, tuple[int, int]]:
    """RAPL package counters (microjoules) with wrap-around; sub-domains are parts of a package and not added."""
    found: dict[str, tuple[int, int]] = {}
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        value, wrap = _number(_text(zone / "energy_uj")), _number(_text(zone / "max_energy_range_uj"))
        if zone.name.count(":") == 1 and value is not None and wrap is not None and wrap > 0:
            found[zone.name] = (value, wrap)
    return found
