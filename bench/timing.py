"""Does `vitrim profile` tell what the runtimes' own tools tell? The p50 of one bundle's artifact, by three kinds of clock.

    python bench/timing.py demo-bundle [--target ort --target openvino] [--rounds 20] [--threads 1] [--runs 300]

Every round starts each contestant in a fresh process, in random order, on the same file with the same threads and settings:
ours is what `vitrim profile` prints; theirs is OpenVINO's `benchmark_app` (synchronous, one stream), and for ONNX Runtime what
`onnxruntime_perf_test` does (Python has no copy of that program): a session, a warm-up, a loop of timed runs, the median.
The table gives the median over rounds of ours / theirs in that round, its 95 % interval, and the same for theirs / theirs of
the round before, which is what the machine's own noise makes of two equal clocks.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compressor.affinity import pinned
from compressor.bundle import Bundle
from compressor.duel import Contender, profile_fresh
from compressor.intervals import paired_ratio
from compressor.profile import ProfileConfig
from compressor.types import Artifact

LOOP = """
import sys, time
import numpy, onnxruntime
path, runs, threads, name, shape = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feeds = {name: numpy.random.default_rng(0).standard_normal([int(n) for n in shape.split(",")], dtype=numpy.float32)}
times = []
for _ in range(runs + 20):
    start = time.perf_counter_ns()
    session.run(None, feeds)
    times.append(time.perf_counter_ns() - start)
print("Median:", numpy.median(times[20:]) / 1e6, "ms")
"""


def shape_of(artifact: Artifact) -> tuple[str, str]:
    feed = artifact.inputs[0]
    return feed.name, ",".join(map(str, (1, *feed.shape[1:])))


def perf_test(artifact: Artifact, threads: int, runs: int) -> list[str]:
    return [sys.executable, "-c", LOOP, str(artifact.path), str(runs), str(threads), *shape_of(artifact)]


def benchmark_app(artifact: Artifact, threads: int, runs: int) -> list[str]:
    name, shape = shape_of(artifact)
    command = (
        f"-d CPU -api sync -hint none -nstreams 1 -nthreads {threads} -niter {runs} -shape {name}[{shape}]".split()
    )
    precision = ["-infer_precision", artifact.settings["INFERENCE_PRECISION_HINT"]]
    return [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(artifact.path), *command, *precision]


THEIRS: dict[str, Callable[[Artifact, int, int], list[str]]] = {"ort": perf_test, "openvino": benchmark_app}


def median_ms(command: list[str], threads: int) -> float:
    """What a tool calls its median, on the CPUs that ours is pinned to."""
    with pinned(threads):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Median:\s+([0-9.]+) (ms|us)", done.stdout)
    if found is None:
        raise SystemExit(f"{command[0]} printed no median:\n{done.stdout[-2000:]}")
    return float(found[1]) / (1 if found[2] == "ms" else 1000)


def compare(path: Path, target: str, rounds: int, threads: int, runs: int) -> str:
    artifact = Bundle.open(path).artifact(target)
    ours = Contender({"path": str(path), "target": target, "threads": threads})
    config = ProfileConfig(runs=runs, threads=threads, target=target)
    contestants: dict[str, Callable[[], float]] = {
        "ours": lambda: profile_fresh(ours, config).latency_ms()["p50"],
        "theirs": lambda: median_ms(THEIRS[target](artifact, threads, runs), threads),
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(sorted(contestants), len(contestants)):
            taken[name].append(contestants[name]())
    clocks = {name: np.array(times) for name, times in taken.items()}
    both = paired_ratio(clocks["ours"], clocks["theirs"])
    noise = paired_ratio(clocks["theirs"][1:], clocks["theirs"][:-1])
    cells = [target, THEIRS[target].__name__, *(f"{np.median(clocks[name]):.3f}" for name in contestants)]
    cells += [f"{r.ratio:.4f} ({r.low:.4f} to {r.high:.4f})" for r in (both, noise)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", action="append", choices=tuple(THEIRS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=300)
    options = parser.parse_args()
    print(
        "| target | their tool | ours, ms | theirs, ms | ours / theirs (95 %) | theirs / theirs before |\n"
        + "|---" * 6
        + "|"
    )
    for target in options.target or THEIRS:
        print(compare(options.bundle, target, options.rounds, options.threads, options.runs), flush=True)


if __name__ == "__main__":
    main()
