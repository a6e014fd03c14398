"""Error rates of the latency gate beside four other rules, on this machine with whatever else runs on it.

    python bench/gate.py --trials 20 --out gate.jsonl      measure: one trial of every scenario in turn; appends
    python bench/gate.py --report gate.jsonl               print the table

A trial runs the gate (`compressor.duel`, limit 1 %, confidence 99 %) on a planted pair of 5 ms networks, then measures the two
networks the way the other rules expect, baseline first, then candidate, 100 inferences each in a process of its own:

    mean +10 %     github-action-benchmark style: fail when the mean is more than 10 % above the baseline's
    mean +5 %      pytest-benchmark --benchmark-compare-fail=mean:5%
    t-test         Welch's t-test on the samples, p < 0.01 and slower
    asv            Mann-Whitney U, p < 0.002, and the median more than 5 % above (asv's is_different and a factor of 1.05)

Scenarios: ``aa`` (a copy against itself), ``wide3/wide5`` (one block's MLP widened), ``spin3/spin5`` (the session burns 3 or 5 %
more CPU time). ``+load`` adds a process that keeps one CPU busy for random spells. Seeds are fixed; random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import targets
from compressor.duel import Contender, DuelConfig, Worker, duel
from compressor.gate import GateConfig
from compressor.profile import ProfileConfig, interleave
from compressor.types import Array, BlockSpec, BuildOptions, Model, OpRecord, Preprocess, Session, VitSpec

ROOT = Path(__file__).parents[1]
WIDE = {"wide3": 232, "wide5": 384}  # hidden units added to one of six blocks of 768
SPIN = {"spin3": 0.03, "spin5": 0.05}
SCENARIOS = ("aa", "aa+load", "wide3", "wide5", "spin3", "spin5")
LOAD = """
import random, time
draw = random.Random(0)
while True:
    end = time.time() + draw.uniform(0.5, 4)
    while time.time() < end:
        pass
    time.sleep(draw.uniform(0.5, 6))
"""
WORKER = ("env", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", sys.executable, "-m", "compressor.worker")


class Spinning:
    """A session that burns `share` more CPU time than the one it wraps."""

    def __init__(self, session: Session, share: float) -> None:
        self.session, self.share = session, share

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        start = time.thread_time_ns()
        outputs = self.session.run(inputs)
        end = start + int((time.thread_time_ns() - start) * (1 + self.share))
        while time.thread_time_ns() < end:
            pass
        return outputs

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        return self.session.ops(inputs)


def open_network(folder: str, extra: int = 0, share: float = 0.0) -> tuple[Callable[[], Session], dict[str, Array]]:
    """For `compressor.worker`: a 224 px network of six 192-wide blocks, one with `extra` more hidden units."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    path = Path(folder) / f"{extra}"
    if not path.exists():
        build(path, extra)
    artifact = json.loads((path / "artifact.json").read_text())

    def opener() -> Session:
        from compressor.types import Artifact, TensorSpec

        specs = {
            k: tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in artifact[k])
            for k in ("inputs", "outputs")
        }
        files = tuple(Path(f) for f in artifact["files"])
        session = targets.get("ort").open(
            Artifact(**{**artifact, **specs, "path": Path(artifact["path"]), "files": files})
        )
        return Spinning(session, share) if share else session

    return opener, {artifact["inputs"][0]["name"]: pixels}


def build(path: Path, extra: int) -> None:
    from compressor.lower import lower  # Here, so that a worker, which only opens, starts as fast as a bundle's

    blocks = tuple(BlockSpec(3, 64, 64, 768 + (extra if i == 2 else 0)) for i in range(6))
    spec = VitSpec((224, 224), (16, 16), 3, 192, blocks)
    rng = np.random.default_rng(0)
    weights = {n: (0.02 * rng.standard_normal(s)).astype(np.float32) for n, s in spec.shapes().items()}
    target = targets.get("ort")
    graph = lower(Model(spec, weights, Preprocess((224, 224))), target.CAPABILITIES)
    artifact = target.build(graph, BuildOptions(path))
    (path / "artifact.json").write_text(json.dumps(asdict(artifact), default=str))


def contender(folder: Path, name: str) -> Contender:
    arguments = {"folder": str(folder), "extra": WIDE.get(name, 0), "share": SPIN.get(name, 0.0)}
    return Contender(arguments, "bench.gate:open_network", WORKER)


def others(candidate: Contender, baseline: Contender) -> dict[str, bool]:
    """Whether each of the other rules fails the candidate."""
    from scipy import stats

    samples = []
    for side in (baseline, candidate):
        with Worker(side, asdict(ProfileConfig(runs=100))) as worker:
            worker.hear()
            samples.append(np.array(worker.ask({"profile": {}})["samples_ns"], dtype=np.float64))
    old, new = samples
    slower = new.mean() > old.mean()
    different = stats.mannwhitneyu(new, old).pvalue < 0.002
    return {
        "mean +10 %": bool(new.mean() > 1.10 * old.mean()),
        "mean +5 %": bool(new.mean() > 1.05 * old.mean()),
        "t-test": bool(slower and stats.ttest_ind(new, old, equal_var=False).pvalue < 0.01),
        "asv": bool(different and np.median(new) > 1.05 * np.median(old)),
    }


def trial(folder: Path, scenario: str, seed: int) -> dict[str, Any]:
    name, _, load = scenario.partition("+")
    noise = subprocess.Popen([sys.executable, "-c", LOAD]) if load else None
    try:
        sides = contender(folder, name), contender(folder, "aa")
        found = duel(*sides, GateConfig(max_regression=0.01, seed=seed), DuelConfig())
        rules = others(*sides)
    finally:
        if noise is not None:
            noise.kill()
            noise.wait()
    verdict = found.verdict
    return {
        "scenario": scenario,
        "seed": seed,
        "load_average": os.getloadavg()[0],
        "verdict": verdict.verdict,
        "ratio": verdict.ratio,
        "ratio_ci": verdict.ratio_ci,
        "min_detectable": verdict.min_detectable,
        "pairs": verdict.pairs,
        "seconds": found.seconds,
        "p50_ms": found.p50_ms(),
        "others": rules,
    }


def measure(out: Path, trials: int, scenarios: tuple[str, ...]) -> None:
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    start = 1 + max((row["seed"] for row in done), default=-1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for extra in (0, *WIDE.values()):
            open_network(name, extra)
        truth(folder)
        for seed in range(start, start + trials):
            for scenario in scenarios:
                row = trial(folder, scenario, seed)
                with out.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                text = f"{seed:4d} {scenario:8s} {row['verdict']:12s} {row['ratio']:.4f}"
                print(f"{text} {row['pairs']:3d} pairs {row['seconds']:.0f} s", flush=True)


def truth(folder: Path) -> None:
    """Print what the widened networks really cost, from one long interleaved measurement in this process."""
    feeds, sessions = {}, {}
    for name, extra in (("aa", 0), *WIDE.items()):
        opener, feeds = open_network(str(folder), extra)
        sessions[name] = opener()
    times = {
        n: np.array(t, dtype=np.float64)
        for n, t in interleave(sessions, feeds, ProfileConfig(runs=400, budget_s=60)).items()
    }
    for name in WIDE:
        print(f"{name}: {np.median(times[name] / times['aa']):.4f}x, {np.median(times['aa']) / 1e6:.2f} ms", flush=True)


def report(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = list(rows[0]["others"])
    print(
        "| scenario | trials | gate: fail | pass | inconclusive | median s | p90 s | pairs | "
        + " | ".join(names)
        + " |"
    )
    print("|---" * (8 + len(names)) + "|")
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        some = [row for row in rows if row["scenario"] == scenario]
        share = {
            v: f"{100 * np.mean([r['verdict'] == v for r in some]):.1f} %" for v in ("fail", "pass", "inconclusive")
        }
        seconds, pairs = [r["seconds"] for r in some], [r["pairs"] for r in some]
        cells = [
            scenario,
            len(some),
            *share.values(),
            f"{np.median(seconds):.0f}",
            f"{np.percentile(seconds, 90):.0f}",
            f"{np.median(pairs):.0f}",
        ]
        cells += [f"{100 * np.mean([r['others'][name] for r in some]):.0f} %" for name in names]
        print("| " + " | ".join(map(str, cells)) + " |")
    load = [row["load_average"] for row in rows]
    ms = np.median([row["p50_ms"]["baseline"] for row in rows])
    low, middle, high = np.percentile(load, (10, 50, 90))
    print(f"\nBaseline {ms:.1f} ms; load average {middle:.1f} (10 % to 90 %: {low:.1f} to {high:.1f}).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS)
    parser.add_argument("--out", type=Path, default=Path("gate.jsonl"))
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if options.report is None:
        measure(options.out, options.trials, tuple(options.scenario or SCENARIOS))
    report(options.report or options.out)


if __name__ == "__main__":
    main()
