"""One run of `vitrim compress`: the only file that knows the order of the stages.

checkpoint -> images -> prune -> quantize -> per target (lower, build, verify, race, keep the fastest) -> evaluate -> bundle
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import targets
from calibration import data
from compressor import __version__, checkpoint
from compressor.build_plan import check_plan, is_planned, make_plan
from compressor.cache import Cache
from compressor.candidates import FLOAT, Contest, Outcome, contest, logits, precisions, require
from compressor.compiled import Compiled, compile_model, is_compiled
from compressor.compiled import to_json as compiled_json
from compressor.device import peak_rss_bytes
from compressor.errors import ConfigError
from compressor.kernels import int8_share
from compressor.loading import load_model, require_exportable
from compressor.manifest import CALIBRATED_ON, artifact_entry, seal
from compressor.output import write_json
from compressor.profile import Stopwatch
from compressor.quantize.plan import for_target
from compressor.quantizing import Quantized, Quantizer
from compressor.race import Race, race_here
from compressor.recipe import Recipe, to_dict
from compressor.report import contact_sheet, render
from compressor.stages import Images, load_images, module_logits, prune_stage, torch_logits
from compressor.types import WEIGHT_ONLY, Array, Artifact, Model, Precision, Progress, latency_ms
from compressor.verdicts import pruning_speed
from compressor.verify import accuracy, tolerance
from compressor.vit import to_torch

__all__ = ["Run", "Tools", "compress", "evaluate", "load", "refuse_early", "run_stages", "with_runnable"]

GOLDEN = 8
SHEET = 48  # calibration images shown in the report
PARITY_IMAGES = 256  # calibration images on which every artifact is held against the model it was built from


@dataclass(frozen=True)
class Tools:
    """What every stage works with.

    Attributes:
        cache: finished stages.
        progress: called with (stage, done, total).
        race: where candidates run against each other: here, or on a device (`remote.race_on`).
        watch: seconds by stage.
    """

    cache: Cache
    progress: Progress
    race: Race = race_here
    watch: Stopwatch = field(default_factory=Stopwatch)


@dataclass(frozen=True)
class Run:
    """What the stages of one run have made so far."""

    recipe: Recipe
    reference: Model
    model: Model
    blocks: list[dict[str, Any]]
    images: Images
    quantized: dict[str, dict[Precision, Quantized]]  # by target
    outcomes: tuple[Outcome, ...]
    plans: tuple[tuple[Artifact, dict[str, Any]], ...]  # completed on the device, and what a check here found
    compiled: tuple[Compiled, ...]  # of chips that are not here
    pixels: Array  # (n, C, h, w) the calibration inputs of the parity checks
    expected: Array  # (n, classes)

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What was kept or compiled, with golden outputs; plans have none yet."""
        return (*(o.kept.artifact for o in self.outcomes), *(c.artifact for c in self.compiled))


def compress(recipe: Recipe, folder: Path, tools: Tools, extras: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fill the empty `folder` with the bundle that `recipe` describes; return the ``vitrim compress --json`` object.

    Args:
        recipe: every choice.
        folder: see `compressor.output`, which makes it appear complete or not at all.
        tools: cache, progress, race.
        extras: further entries of the result and the report.

    Raises:
        VitrimError: any of the tree in `compressor.errors`.
    """
    refuse_early(recipe)
    watch = tools.watch
    with watch("load"):
        reference, images = load(recipe, tools)
    run = run_stages(recipe, reference, images, folder, tools)
    with watch("evaluate"):
        accuracies = evaluate(run, tools.progress)
    result = _result(run, accuracies)
    with watch("bundle"):
        manifest = _write(run, folder)
    result |= {
        "timings_s": watch.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "recipe": to_dict(recipe),
        "seed": recipe.seed,
        **(extras or {}),
    }
    samples = {o.target: list(o.reference_ns) for o in run.outcomes}
    entries = [{**t, "reference_samples_ns": samples[t["name"]]} for t in result["targets"]]
    report = {**result, "targets": entries, **_report_extras(run, manifest)}
    write_json(folder / "report.json", report)
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    seal(folder, manifest)
    return result


def load(recipe: Recipe, tools: Tools) -> tuple[Model, Images]:
    """The model and the images that `recipe` names."""
    reference = load_model(recipe.model, arch=recipe.arch, image_size=recipe.image_size)
    require_exportable(reference.spec)
    return reference, load_images(recipe, reference, tools.progress)


def with_runnable(recipe: Recipe) -> Recipe:
    """`recipe` with ``ort`` added where every target only builds here: what is measured and golden has to run."""
    if any(not (is_planned(name) or is_compiled(name)) for name in recipe.targets):
        return recipe
    return replace(recipe, targets=(*recipe.targets, "ort"))


def refuse_early(recipe: Recipe) -> None:
    """Whatever can be refused is refused before any work."""
    for name in recipe.targets:
        precisions(name, recipe.precision)
        if not is_planned(name):
            require(name)
        if recipe.quantizer == "nncf" and name != "openvino":
            raise ConfigError(f"quantizer 'nncf' must be used with target 'openvino' alone, got {name!r}.")
    if all(is_planned(name) or is_compiled(name) for name in recipe.targets):
        raise ConfigError(
            f"targets must hold at least one that runs here, got {', '.join(recipe.targets)}.", hint="Add --target ort."
        )


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def run_stages(recipe: Recipe, reference: Model, images: Images, folder: Path, tools: Tools) -> Run:
    """Prune, quantize, and hold every target's contest; artifacts are left under `folder`."""
    _limit_threads(recipe.threads)
    cache, progress, watch = tools.cache, tools.progress, tools.watch
    with watch("prune"):
        model, blocks = prune_stage(reference, images.calibration, recipe, cache, progress)
    subset = images.calibration.subset(range(min(PARITY_IMAGES, len(images.calibration))))
    pixels = np.concatenate(list(data.batches(subset, model.preprocess, 64)))
    expected = torch_logits(model, pixels)
    with watch("quantize"):
        quantized = _quantize(recipe, Quantizer(model, images.calibration, pixels, cache, progress))
    job = Contest(
        reference,
        model,
        expected,
        pixels,
        pixels[:GOLDEN],
        threads=recipe.threads,
        quantizer=recipe.quantizer,
        min_agreement=recipe.min_agreement,
        race=tools.race,
    )
    outcomes, plans, compiled = [], [], []
    for done, name in enumerate(recipe.targets, 1):
        with watch(f"target {name}"):
            home = folder / "targets" / name
            home.mkdir(parents=True)
            grids = {p: q.refined for p, q in quantized.get(name, {}).items()}
            if is_planned(name):
                plan = make_plan(model, name, precisions(name, recipe.precision), grids, home)
                plans.append((plan, check_plan(plan)))
            elif is_compiled(name):
                compiled.append(compile_model(job, name, recipe.precision, home))
            else:
                outcomes.append(contest(replace(job, quantizations=grids), name, recipe.precision, home))
        progress("build, verify, race", done, len(recipe.targets))
    made = tuple(outcomes), tuple(plans), tuple(compiled)
    return Run(recipe, reference, model, blocks, images, quantized, *made, pixels, expected)


def _quantize(recipe: Recipe, quantizer: Quantizer) -> dict[str, dict[Precision, Quantized]]:
    """What each target that takes our integers is to run, by precision; targets that want the same grids share them."""
    if recipe.quantizer != "vitrim":
        return {}
    made: dict[Any, Quantized] = {}
    found: dict[str, dict[Precision, Quantized]] = {}
    for name in recipe.targets:
        if is_compiled(name):  # a vendor's compiler quantizes by itself
            continue
        wanted = [p for p in precisions(name, recipe.precision) if p not in FLOAT]
        configs = {p: for_target(targets.get(name).CAPABILITIES, p) for p in wanted}
        for config in configs.values():
            if config not in made:
                made[config] = quantizer.quantize(config, recipe.min_agreement)
        found[name] = {p: made[config] for p, config in configs.items()}
    return found


def evaluate(run: Run, progress: Progress) -> dict[str, dict[str, Any]]:
    """Accuracy of the reference and of each kept artifact; without evaluation images, agreement on calibration images."""
    images, answers = run.images.evaluation, defaultdict[str, list[Array]](list)
    module, kept = to_torch(run.reference), {o.target: o.kept.artifact for o in run.outcomes}
    sessions = {name: targets.get(name).open(a, threads=run.recipe.threads) for name, a in kept.items()}
    stream: Iterable[Array] = [run.pixels]
    if images is not None:
        stream = data.batches(images, run.model.preprocess, 100, partial(progress, "evaluate"))
    for pixels in stream:
        answers["reference"].append(module_logits(module, pixels))
        for name, session in sessions.items():
            answers[name].append(logits(session, kept[name], pixels))
    whole = {name: np.concatenate(parts) for name, parts in answers.items()}
    reference = whole.pop("reference")
    found = {name: accuracy(got, run.images.labels, reference) for name, got in whole.items()}
    return {"reference": accuracy(reference, run.images.labels), **found}


def _result(run: Run, accuracies: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first = accuracies[run.outcomes[0].target]
    dense = accuracies["reference"]
    return {
        "model": run.reference.origin.name or run.recipe.model,
        "reference": {
            "params": run.reference.params,
            "macs": run.reference.spec.macs(),
            "top1": dense["top1"],
            "top1_ci95": dense["top1_ci95"],
        },
        "compressed": {
            "params": run.model.params,
            "macs": run.model.spec.macs(),
            "top1": first["top1"],
            "top1_ci95": first["top1_ci95"],
            "agreement": first["agreement"],
            "precision": run.outcomes[0].kept.artifact.precision,
            "evaluated_on": "evaluation" if run.images.evaluation is not None else "calibration",
            "n": first["n"],
        },
        "targets": [_target_result(run, o, accuracies[o.target]) for o in run.outcomes],
        "compiled": [compiled_json(c) for c in run.compiled],
        "plans": [
            {"name": p.target, "size_bytes": p.size_bytes, "next": "vitrim build, on the device", "checked": checked}
            for p, checked in run.plans
        ],
    }


def _target_result(run: Run, outcome: Outcome, found: dict[str, Any]) -> dict[str, Any]:
    kept = outcome.kept
    quantized = run.quantized.get(outcome.target, {}).get(kept.artifact.precision)
    kept_float = quantized.kept_float if quantized else ()
    reference, latency = latency_ms(outcome.reference_ns), latency_ms(kept.samples_ns)
    return {
        "name": outcome.target,
        "artifact": f"targets/{outcome.target}/{kept.artifact.path.name}",
        "precision": kept.artifact.precision,
        "size_bytes": kept.artifact.size_bytes,
        "latency_ms": latency,
        "reference_latency_ms": reference,
        "speedup": reference["p50"] / latency["p50"],
        "parity": {**asdict(kept.parity), "agreement": 100 * kept.parity.agreement},
        "reverted": outcome.reverted,
        "reason": outcome.reason,
        "settings": dict(kept.artifact.settings),
        "kept_float": list(kept_float),
        "pruning": _pruning(run, outcome),
        **int8_share(outcome.ops, run.model.spec, kept_float, weight_only=kept.artifact.precision in WEIGHT_ONLY),
        "accuracy": found,
    }


def _pruning(run: Run, outcome: Outcome) -> dict[str, Any] | None:
    """Whether pruning alone made the target faster, in float; None where nothing was pruned."""
    if not run.recipe.prunes:
        return None
    return pruning_speed(outcome.target, outcome.candidates[0].samples_ns, outcome.reference_ns)


def _write(run: Run, folder: Path) -> dict[str, Any]:
    """Everything of the bundle but the reports and the seal; returns the manifest's content."""
    checkpoint.save(run.model, folder)
    arrays: dict[str, Any] = {f"outputs.{o.target}": o.kept.golden for o in run.outcomes}
    arrays |= {f"outputs.{c.artifact.target}": c.golden for c in run.compiled}
    for kept in run.artifacts:
        arrays[f"tolerance.{kept.target}"] = tolerance(arrays[f"outputs.{kept.target}"], kept.precision)
    np.savez(folder / "golden.npz", inputs=run.pixels[:GOLDEN], reference=run.expected[:GOLDEN], **arrays)
    hashes = run.images.calibration.content_hashes()
    (folder / CALIBRATED_ON).write_text("".join(f"{image}\n" for image in hashes))
    origin = run.reference.origin
    return {
        "spec": asdict(run.model.spec),
        "preprocess": asdict(run.model.preprocess),
        "labels": list(run.model.labels),
        "recipe": to_dict(run.recipe),
        "versions": _versions(),
        "seed": run.recipe.seed,
        "calibration": _which(run.images.calibration),
        "checkpoint": {"family": origin.family, "name": origin.name, "sha256": origin.sha256, "params": origin.params},
        "targets": {
            a.target: artifact_entry(a, folder).model_dump() for a in (*run.artifacts, *(p for p, _ in run.plans))
        },
    }


def _which(images: data.ImageSet) -> dict[str, Any]:
    """Which images these are, so that figures of others are not held against theirs."""
    return {"source": images.source, "count": len(images), "sha256": images.digest()}


def _versions() -> dict[str, str]:
    found = {"vitrim": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "onnx-ir", "onnxruntime", "openvino", "nncf"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _report_extras(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """What report.json holds beyond the result: blocks, every candidate tried, per-op tables, provenance."""
    candidates = [
        {
            "target": o.target,
            "label": c.label,
            "precision": c.artifact.precision,
            "latency_ms": latency_ms(c.samples_ns),
            "samples_ns": list(c.samples_ns),
            "agreement": 100 * c.parity.agreement,
            "kept": c is o.kept,
        }
        for o in run.outcomes
        for c in o.candidates
    ]
    provenance = {k: manifest[k] for k in ("versions", "seed", "recipe", "checkpoint", "calibration")}
    if run.images.evaluation is not None:
        provenance["evaluation"] = _which(run.images.evaluation)
    return {
        "blocks": run.blocks,
        "candidates": candidates,
        "ops": {o.target: [asdict(op) for op in o.ops] for o in run.outcomes},
        "reference_ops": {o.target: [asdict(op) for op in o.reference_ops] for o in run.outcomes},
        "sensitivity": _sensitivity(run),
        "contact_sheet": {
            "image": contact_sheet(_pictures(run)),
            "caption": "Calibration images as the network sees them.",
        },
        "provenance": {**provenance, "device": dict(run.outcomes[0].device)},
    }


def _sensitivity(run: Run) -> dict[str, Any] | None:
    """Divergence per site, a row per block and a column per site, of the first quantization made."""
    tables = [(p, q.sensitivity) for made in run.quantized.values() for p, q in made.items()]
    if not tables:
        return None
    precision, table = tables[0]
    cells = {tuple(s.site.rpartition(".")[::2]): s.divergence for s in table if s.site.startswith("blocks.")}
    columns = list(dict.fromkeys(site for _, site in cells))
    rows = list(dict.fromkeys(block for block, _ in cells))
    return {
        "rows": rows,
        "columns": columns,
        "values": [[cells.get((row, column), 0.0) for column in columns] for row in rows],
        "unit": f"KL divergence (nats) from the float prediction when one site alone runs in {precision}.",
        "sites": [asdict(s) for s in table],
    }


def _pictures(run: Run) -> Array:
    """The first calibration inputs as uint8 images (n, h, w, C)."""
    contract = run.model.preprocess
    pixels = run.pixels[:SHEET] * np.asarray(contract.std)[:, None, None] + np.asarray(contract.mean)[:, None, None]
    pictures: Array = np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return pictures
