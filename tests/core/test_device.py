"""What is read of the machine, from a made-up file system where everything is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compressor.device import QueueClock, conditions, fingerprint, identity, peak_rss_bytes, read_counters

STAT = "77 (a ) strange (name)) S 1 2 3 4 5 6 7 8 9 10 {utime} {stime} 0 0 20 0 1 0 100"


def machine(root: Path, **changes: str) -> Path:
    """A file system with every source that `compressor.device` reads."""
    files = {
        "proc/cpuinfo": "model name\t: Test CPU\nflags\t\t: fpu avx2 fma amx_int8\nphysical id\t: 0\ncore id\t: 0\n\n"
        "model name\t: Test CPU\nflags\t\t: fpu avx2 fma amx_int8\nphysical id\t: 0\ncore id\t: 1\n",
        "proc/meminfo": "MemTotal:       2048 kB\n",
        "proc/stat": "cpu  100 0 50 800 10 0 5 35 0 0\ncpu0 1 2 3\n",
        "proc/self/stat": STAT.format(utime=40, stime=10),
        "proc/self/status": "VmHWM:\t   123 kB\nnonvoluntary_ctxt_switches:\t7\n",
        "proc/thread-self/schedstat": "1000 2000000 3\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2000000\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "3000000\n",
        "sys/class/thermal/thermal_zone0/temp": "41000\n",
        "sys/class/thermal/thermal_zone1/temp": "55500\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": "1048576\n",
        "sys/fs/cgroup/cpu.stat": "usage_usec 1\nthrottled_usec 4000\n",
        "sys/class/powercap/intel-rapl:0/energy_uj": "9000000\n",
        "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "10000000\n",
        "sys/class/powercap/intel-rapl:0:0/energy_uj": "5\n",
        "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": "10000000\n",
    }
    for name, text in {**files, **changes}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_fingerprint_reads_every_source(tmp_path: Path) -> None:
    found = fingerprint({"onnxruntime": "1.2.3"}, root=machine(tmp_path))
    assert found["cpu"]["model"] == "Test CPU"
    assert found["cpu"]["features"] == ["avx2", "fma", "amx_int8"]
    assert found["cpu"]["physical"] == 2
    assert (found["governor"], found["frequency_mhz"], found["temperature_c"]) == ("performance", 2500.0, 55.5)
    assert found["limits"] == {"cpus": 1.5, "memory_bytes": 1048576}
    assert found["memory_bytes"] == 2048 * 1024
    assert found["versions"]["onnxruntime"] == "1.2.3"


def test_fingerprint_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    found = fingerprint(root=tmp_path)
    assert not {"governor", "frequency_mhz", "temperature_c", "limits", "memory_bytes"} & found.keys()
    assert None not in found.values()


def test_fingerprint_reads_the_older_container_limits(tmp_path: Path) -> None:
    v1 = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",  # how v1 spells "no limit"
    }
    for name, text in v1.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert fingerprint(root=tmp_path)["limits"] == {"cpus": 0.5}


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        ("sys/class/thermal/thermal_zone1/temp", "90000\n", True),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1000000\n", True),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n", False),
        ("sys/fs/cgroup/cpu.max", "max 100000\n", False),
        ("proc/cpuinfo", "model name\t: Other CPU\nflags\t\t: avx2\n", False),
    ],
)
def test_identity_changes_with_what_makes_times_incomparable(tmp_path: Path, name: str, text: str, same: bool) -> None:
    one = fingerprint(root=machine(tmp_path / "one"))
    two = fingerprint({"onnxruntime": "9"}, root=machine(tmp_path / "two", **{name: text}))
    assert (one["id"] == two["id"]) is same
    assert one["id"] == identity(one)


def test_conditions_are_the_differences(tmp_path: Path) -> None:
    before = read_counters(root=machine(tmp_path))
    changes = {
        "proc/stat": "cpu  160 0 50 830 10 0 5 45 0 0\n",  # 100 ticks: 60 busy, 30 idle, 10 stolen
        "proc/self/stat": STAT.format(utime=60, stime=15),  # 25 of the 60 were ours
        "proc/self/status": "nonvoluntary_ctxt_switches:\t9\n",
        "proc/thread-self/schedstat": "1000 5000000 3\n",
        "sys/fs/cgroup/cpu.stat": "throttled_usec 6500\n",
        "sys/class/powercap/intel-rapl:0/energy_uj": "1000000\n",  # wrapped: 2 J spent; the sub-domain does not count
    }
    found = conditions(before, read_counters(root=machine(tmp_path, **changes)), runs=10)
    assert found["steal_share"] == 0.1
    assert found["others_share"] == 0.35
    assert found["involuntary_switches"] == 2
    assert found["waited_ms"] == 3.0
    assert found["throttled_ms"] == 2.5
    assert found["energy_mj_per_run"] == 200.0
    assert found["temperature_c"] == [55.5, 55.5]


def test_conditions_leave_out_what_cannot_be_read(tmp_path: Path) -> None:
    nothing = read_counters(root=tmp_path)
    found = conditions(nothing, nothing, runs=5)
    assert found.keys() == {"involuntary_switches", "waited_ms"}


def test_peak_rss_is_the_process_own_and_not_its_parents() -> None:
    ballast = bytearray(200 << 20)  # getrusage would report this of a child
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    code = "from compressor.device import peak_rss_bytes; print(peak_rss_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < child < 150 << 20 < peak_rss_bytes()


def test_queue_clock_never_runs_backwards() -> None:
    with QueueClock() as waited:
        first = waited()
        assert 0 <= first <= waited()
