"""One-shot pruning without fine-tuning: obs beside CORP, GRAIL, magnitude and Torch-Pruning on one trained model.

    python bench/pruning.py [MODEL] [--data D] [--eval E] [--images 256] [--ratios 0.25 0.5 ...] [--rows obs ...]
    [--json FILE]

Every row removes the same share of every block's hidden units and of every head's query/key dimensions, so that MACs
are equal within a ratio, except: `obs + V/O` removes that share of the values too; `obs allocated` spreads the same
MACs over the network as it sees fit; CORP and GRAIL stop at 8 dimensions and 64 units, as published, and `obs, CORP's
sizes` stops there too; Torch-Pruning cannot cut queries and keys without values, and so ends with fewer MACs.

    none           CORP's choice of units, deleted
    magnitude      units and dimensions of least weight magnitude, deleted
    CORP released  as its authors' code does it            CORP fixed  the same with its faults repaired
    GRAIL          hidden units regressed with uncentred Gram sums, no intercept, ridge 1e-3 of the mean
                   (arXiv 2602.23795); it has no Q/K step and is given that of CORP fixed
    Torch-Pruning  its group magnitude pruner on the same network, when it is installed (PYTHONPATH serves)

`KL` is the mean divergence from the dense prediction, `KL / obs` its ratio to the obs row on the same images with a
paired bootstrap interval. Each row is a process of its own, so that peak memory is its own; time is that of pruning
alone.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trial import Trial, arguments, divergence, open_trial

from calibration.observe import ObservePlan, observe
from compressor.intervals import proportion_interval
from compressor.prune import CorpConfig, ObsConfig, corp, obs
from compressor.prune.rank import MLP_SALIENCIES, split
from compressor.stages import torch_logits
from compressor.types import Array, Model, Statistics, VitSpec
from compressor.vit import VisionTransformer, to_torch

RATIOS = (0.25, 0.5, 0.625, 0.75, 0.875)


def statistics(task: Trial) -> Statistics:
    plan = ObservePlan(tokens_per_image=None, histograms=())
    return observe(to_torch(task.model), task.batches(), plan)


def run_corp(task: Trial, config: CorpConfig) -> Model:
    return corp.prune(task.model, statistics(task), config).model


def run_obs(task: Trial, config: ObsConfig) -> Model:
    return obs.prune(task.model, task.batches, config, "cpu").model


def corp_sizes(spec: VitSpec, ratio: float) -> ObsConfig:
    """The ratios that leave what CORP leaves, whose floors are sizes; of the first block, as of all in a dense model."""
    block = spec.blocks[0]
    units = max(block.mlp_dim - int(block.mlp_dim * ratio), min(corp.MIN_UNITS, block.mlp_dim))
    dims = max(block.qk_dim - int(block.qk_dim * ratio), min(corp.MIN_QK_DIM, block.qk_dim))
    return ObsConfig(1 - units / block.mlp_dim, 1 - dims / block.qk_dim)


def run_allocated(task: Trial, ratio: float) -> Model:
    """The MACs that `ratio` of hidden units and query/key dimensions leaves, spread freely."""
    blocks = tuple(obs.uniform(b, ObsConfig(ratio, ratio)) for b in task.model.spec.blocks)
    share = replace(task.model.spec, blocks=blocks).macs() / task.model.spec.macs()
    return run_obs(task, ObsConfig(target=("macs", share)))


def delete(model: Model, units: list[Array], dims: list[Array]) -> Model:
    """`model` with only `units` (kept) of each block and `dims` (H, kept) of each head, nothing made up for."""
    changed, blocks = {}, []
    for i, block in enumerate(model.spec.blocks):
        weights = {n: model.weights[f"blocks.{i}.{n}"] for n in ("fc1.weight", "fc1.bias", "fc2.weight")}
        rows = ("fc1", "gate") if block.mlp == "swiglu" else ("fc1",)
        for part in rows:
            for kind in ("weight", "bias"):
                changed[f"blocks.{i}.{part}.{kind}"] = model.weights[f"blocks.{i}.{part}.{kind}"][units[i]]
        changed[f"blocks.{i}.fc2.weight"] = weights["fc2.weight"][:, units[i]]
        index = (np.arange(block.heads)[:, None] * block.qk_dim + dims[i]).ravel()
        for part in ("q", "k"):
            for kind in ("weight", "bias"):
                changed[f"blocks.{i}.{part}.{kind}"] = model.weights[f"blocks.{i}.{part}.{kind}"][index]
        blocks.append(replace(block, mlp_dim=len(units[i]), qk_dim=dims[i].shape[1]))
    return model.with_weights(replace(model.spec, blocks=tuple(blocks)), changed)


def norms(model: Model, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """||fc1 row||, ||fc2 column|| of every hidden unit of block i; a gate counts with fc1."""
    rows = [f"blocks.{i}.{p}.weight" for p in ("fc1", "gate") if f"blocks.{i}.{p}.weight" in model.weights]
    w_in = np.linalg.norm([np.linalg.norm(model.weights[r], axis=1) for r in rows], axis=0)
    return torch.from_numpy(w_in), torch.from_numpy(np.linalg.norm(model.weights[f"blocks.{i}.fc2.weight"], axis=0))


def kept_units(model: Model, i: int, energy: torch.Tensor, ratio: float, saliency: str) -> tuple[Array, Array]:
    block = model.spec.blocks[i]
    keep = max(block.mlp_dim - int(block.mlp_dim * ratio), min(corp.MIN_UNITS, block.mlp_dim))
    kept, gone = split(MLP_SALIENCIES[saliency](energy, *norms(model, i)), keep)  # type: ignore[index]
    return kept.numpy(), gone.numpy()


def run_none(task: Trial, ratio: float) -> Model:
    stats, units, dims = statistics(task), [], []
    for i, block in enumerate(task.model.spec.blocks):
        energy = stats.moments[f"blocks.{i}.fc2"].second.diagonal()
        units.append(kept_units(task.model, i, energy, ratio, "energy_weightmagnitude")[0])
        dims.append(split(stats.pair_energy[f"blocks.{i}"], block.qk_dim - int(block.qk_dim * ratio))[0].numpy())
    return delete(task.model, units, dims)


def run_magnitude(task: Trial, ratio: float) -> Model:
    units, dims = [], []
    for i, block in enumerate(task.model.spec.blocks):
        units.append(kept_units(task.model, i, torch.zeros(block.mlp_dim), ratio, "weight_magnitude")[0])
        q, k = (
            np.linalg.norm(task.model.weights[f"blocks.{i}.{p}.weight"].reshape(block.heads, block.qk_dim, -1), axis=2)
            for p in ("q", "k")
        )
        dims.append(split(torch.from_numpy(q * k), block.qk_dim - int(block.qk_dim * ratio))[0].numpy())
    return delete(task.model, units, dims)


def run_grail(task: Trial, ratio: float) -> Model:
    """fc2' = fc2 G[:, S] (G_SS + lambda I)^-1, bias unchanged; everything else as CORP fixed leaves it."""
    stats = statistics(task)
    small = corp.prune(task.model, stats, CorpConfig.fixed(ratio, ratio)).model
    changed = {}
    for i in range(len(small.spec.blocks)):
        gram = stats.moments[f"blocks.{i}.fc2"].second.numpy()
        kept, _ = kept_units(task.model, i, torch.from_numpy(gram.diagonal().copy()), ratio, "energy_weightmagnitude")
        own = gram[np.ix_(kept, kept)]
        own = own + 1e-3 * own.diagonal().mean() * np.eye(len(kept))
        fold = np.linalg.solve(own, gram[kept]).T  # (M, kept)
        changed[f"blocks.{i}.fc2.weight"] = (task.model.weights[f"blocks.{i}.fc2.weight"] @ fold).astype(np.float32)
        changed[f"blocks.{i}.fc2.bias"] = task.model.weights[f"blocks.{i}.fc2.bias"]
    return small.with_weights(small.spec, changed)


def run_torch_pruning(task: Trial, ratio: float) -> Model:
    import torch_pruning as tp

    network = to_torch(task.model).requires_grad_()
    ratios = {layer: ratio for block in network.blocks for layer in (block.fc1, block.q)}
    heads = {layer: block.spec.heads for block in network.blocks for layer in (block.q, block.k, block.v)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp.pruner.BasePruner(
            network,
            torch.from_numpy(task.calibration[:1]),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
            num_heads=heads,
            prune_head_dims=True,
            ignored_layers=[network.head],
        ).step()
    return from_torch(task.model, network)


def from_torch(model: Model, network: VisionTransformer) -> Model:
    weights = {n: p.detach().numpy() for n, p in network.named_parameters()}
    blocks = tuple(
        replace(
            b,
            qk_dim=len(weights[f"blocks.{i}.q.bias"]) // b.heads,
            v_dim=len(weights[f"blocks.{i}.v.bias"]) // b.heads,
            mlp_dim=len(weights[f"blocks.{i}.fc1.bias"]),
        )
        for i, b in enumerate(model.spec.blocks)
    )
    return model.with_weights(replace(model.spec, blocks=blocks), weights)


def rows(ratio: float, spec: VitSpec) -> dict[str, Callable[[Trial], Model]]:
    """Name -> what makes the pruned model; obs first, which the others are compared with."""
    table: dict[str, Callable[[Trial], Model]] = {
        "obs": partial(run_obs, config=ObsConfig(ratio, ratio)),
        "none": partial(run_none, ratio=ratio),
        "magnitude": partial(run_magnitude, ratio=ratio),
        "CORP released": partial(run_corp, config=CorpConfig.released(ratio, ratio)),
        "CORP fixed": partial(run_corp, config=CorpConfig.fixed(ratio, ratio)),
        "GRAIL": partial(run_grail, ratio=ratio),
        "obs + V/O": partial(run_obs, config=ObsConfig(ratio, ratio, ratio)),
        "obs allocated": partial(run_allocated, ratio=ratio),
    }
    floored = corp_sizes(spec, ratio)
    if obs.uniform(spec.blocks[0], floored) != obs.uniform(spec.blocks[0], ObsConfig(ratio, ratio)):
        table["obs, CORP's sizes"] = partial(run_obs, config=floored)
    if importlib.util.find_spec("torch_pruning") is not None:
        table["Torch-Pruning"] = partial(run_torch_pruning, ratio=ratio)
    return table


def measure(task: Trial, make: Callable[[Trial], Model], pipe: Any) -> None:
    started = time.perf_counter()
    small = make(task)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the evaluation
    got = torch_logits(small, task.evaluation)
    pipe.send(
        {
            "macs": small.spec.macs() / task.model.spec.macs(),
            "params": small.spec.params() / task.model.spec.params(),
            "classes": got.argmax(1),
            "kl": divergence(task.reference, got),
            "seconds": seconds,
            "peak_gb": peak,
        }
    )


def ratio_interval(a: Array, b: Array, draws: int = 2000) -> tuple[float, float, float]:
    """mean(a) / mean(b) and its 95 % interval over images drawn again, the same for both."""
    index = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    drawn = a[index].mean(1) / b[index].mean(1)
    return float(a.mean() / b.mean()), *(float(x) for x in np.percentile(drawn, [2.5, 97.5]))


def summary(
    task: Trial, name: str, ratio: float, found: dict[str, Any], rival: dict[str, Any] | None
) -> dict[str, Any]:
    n, same = len(found["classes"]), found["classes"] == task.reference.argmax(1)
    row: dict[str, Any] = {"ratio": ratio, "row": name, "macs": found["macs"], "params": found["params"]}
    row["agreement"] = float(same.mean())
    row["agreement_ci95"] = proportion_interval(int(same.sum()), n)
    if task.labels is not None:
        right = found["classes"] == task.labels
        row["top1"], row["top1_ci95"] = float(right.mean()), proportion_interval(int(right.sum()), n)
    row["kl"] = float(found["kl"].mean())
    if rival is not None:
        row["kl_over_obs"] = ratio_interval(found["kl"], rival["kl"])
    return row | {"seconds": found["seconds"], "peak_gb": found["peak_gb"]}


def percent(share: float, interval: tuple[float, float]) -> str:
    return f"{100 * share:.2f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def line(row: dict[str, Any]) -> str:
    top1 = percent(row["top1"], row["top1_ci95"]) if "top1" in row else ""
    against = "{:.1f} [{:.1f}, {:.1f}]".format(*row["kl_over_obs"]) if "kl_over_obs" in row else ""
    cells = [f"{row['ratio']}", row["row"], f"{row['macs']:.3f}", f"{row['params']:.3f}", top1]
    cells += [percent(row["agreement"], row["agreement_ci95"]), f"{row['kl']:.5f}", against]
    return "| " + " | ".join([*cells, f"{row['seconds']:.1f}", f"{row['peak_gb']:.2f}"]) + " |"


def run_row(task: Trial, make: Callable[[Trial], Model]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=measure, args=(task, make, send))
    child.start()
    send.close()
    found: dict[str, Any] = receive.recv()
    child.join()
    return found


def main() -> None:
    parser = arguments(__doc__, images=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--rows", nargs="+", default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    task = open_trial(options)
    print(f"{options.model}: {len(task.calibration)} calibration and {len(task.evaluation)} evaluation images")
    if task.labels is not None:
        print(f"dense top-1 {100 * (task.reference.argmax(1) == task.labels).mean():.2f} %")
    header = "ratio | row | MACs | params | top-1 % | agreement % | KL | KL / obs | s | peak GB"
    print(f"\n| {header} |\n" + "|---" * 10 + "|")
    results = []
    for ratio in options.ratios:
        rival = None
        for name, make in rows(ratio, task.model.spec).items():
            if options.rows is not None and name not in options.rows:
                continue
            found = run_row(task, make)
            rival = found if name == "obs" else rival
            results.append(summary(task, name, ratio, found, rival))
            print(line(results[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
