"""Plain export against vitrim's form, and dense against pruned, on every NPU compiler that is installed here.

    python bench/npu.py [--target bpu] [--depth 2] [--size tiny] [--forms plain ours half] [--effort O2] [--images 100]
                        [--model demo] [--precision w8a8]

plain  torch's own export of the network as timm writes it: one qkv linear, a 16 x 16 patch convolution, softmax(q k) v. At
       opset 18 or 20 by torch.export; at opset 11, which it cannot reach, by tracing, its constants folded.
ours   what `vitrim compress` builds.
half   ours, pruned. DeiT shape: half of every MLP, and half of the heads, or of every head where their number is odd. Trained
       model: half of every MLP and of every head's dimensions, by `compress`'s pruner on the calibration images.

Latencies and cycles are the vendor's estimates, never measurements, and the same effort of the compiler is used for every
graph. The DeiT shapes have random weights: only placement and estimates are read from them. A trained model (the embedded one, or
any other of its images) is calibrated on calibration images; on evaluation images the compiler's own quantized model, in its
simulator, is held against float, pruned like it: how often both choose one class, and the top-1 of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn

import targets
from calibration import data
from compressor import checkpoint
from compressor.errors import VitrimError
from compressor.lower import lower
from compressor.prune import ObsConfig, obs
from compressor.prune.obs import uniform
from compressor.stages import torch_logits
from compressor.types import Array, Artifact, BlockSpec, BuildOptions, Model, Precision, Preprocess, VitSpec
from targets import _estimate, bpu

TARGETS = ("bpu", "qnn", "rknn")
FORMS = ("plain", "ours", "half")
WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
CALIBRATION = 100


# --------------------------------------------------------------------------- the networks


def deit(size: str, depth: int, config: ObsConfig | None = None) -> Model:
    """Random weights, of the sizes that `config` leaves."""
    width, heads = WIDTHS[size]
    whole = BlockSpec(heads, 64, 64, 4 * width)
    spec = VitSpec((224, 224), (16, 16), 3, width, (uniform(whole, config) if config else whole,) * depth)
    rng = np.random.default_rng(0)
    weights = {n: (0.02 * rng.standard_normal(s)).astype(np.float32) for n, s in spec.shapes().items()}
    ones = {n: np.ones_like(w) for n, w in weights.items() if "norm" in n and n.endswith("weight")}
    return Model(spec, weights | ones, Preprocess(spec.image_size))


def half(target: str, *, heads: bool) -> ObsConfig:
    """Half of every MLP, and of the heads or of every head, rounded as `compress` does for `target` alone."""
    form = targets.get(target).CAPABILITIES
    inside, whole = (0.0, 0.5) if heads else (0.5, 0.0)
    rows = int(form.softmax == "exp")
    return ObsConfig(0.5, inside, inside, whole, width_multiple=form.width_multiple, value_rows=rows)


class PlainBlock(nn.Module):
    """A block as timm writes it, without fused attention."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """A class-token Vision Transformer as timm writes it."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        width, (first, *_) = spec.embed_dim, spec.blocks
        self.patch = nn.Conv2d(spec.in_chans, width, spec.patch_size, spec.patch_size)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, spec.tokens, width))
        blocks = [PlainBlock(width, first.heads, first.mlp_dim, spec.norm_eps) for _ in spec.blocks]
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width, spec.norm_eps), nn.Linear(width, spec.num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


def plain_module(model: Model) -> Plain:
    """The unpruned `model` with its weights in timm's places."""
    module, w = Plain(model.spec), {n: torch.from_numpy(a) for n, a in model.weights.items()}
    token = {"token": w["prefix"][None], "position": torch.cat([torch.zeros_like(w["prefix"]), w["pos"]])[None]}
    state = {n: w[n] for n in w if n.split(".")[0] in ("patch", "norm", "head")} | token
    for i, block in enumerate(model.spec.blocks):
        at, scale = f"blocks.{i}", block.qk_dim**0.5  # the softmax scale is inside our q
        for kind in ("weight", "bias"):
            q, k, v = (w[f"{at}.{part}.{kind}"] for part in "qkv")
            state[f"{at}.qkv.{kind}"] = torch.cat([q * scale, k, v])
            state |= {f"{at}.{n}.{kind}": w[f"{at}.{n}.{kind}"] for n in ("norm1", "norm2", "proj")}
            state |= {f"{at}.mlp.{n}.{kind}": w[f"{at}.{part}.{kind}"] for n, part in ((0, "fc1"), (2, "fc2"))}
    module.load_state_dict(state)
    return module.eval()


def export(model: Model, opset: int) -> onnx_ir.Model:
    """torch's ONNX graph of the plain module."""
    from onnxscript import optimizer

    module, example = plain_module(model), torch.zeros(1, model.spec.in_chans, *model.spec.image_size)
    assert np.abs(module(example).detach().numpy() - torch_logits(model, example.numpy())).max() < 1e-3
    names = {"input_names": ["pixels"], "output_names": ["logits"], "opset_version": opset}
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        if opset >= 18:
            program = torch.onnx.export(module, (example,), dynamo=True, **names)
            assert program is not None
            return program.model
        file = BytesIO()
        torch.onnx.export(module, (example,), file, dynamo=False, **names)
        import onnx

        graph = onnx_ir.from_proto(onnx.load_from_string(file.getvalue()))
        optimizer.optimize_ir(graph)
        return graph


@dataclass(frozen=True)
class Job:
    """One network for one compiler; `trained` brings the evaluation images and their labels."""

    target: str
    label: str
    model: Model
    calibration: Array
    trained: tuple[Array, Array] | None
    args: argparse.Namespace

    def build(self, form: str, graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
        """A plain export gets no grids from us: the mapper calibrates it, as it does for whoever hands it one."""
        if self.target != "bpu":
            return targets.get(self.target).build(graph, options)
        alone = mock.patch.object(bpu, "_quantized", lambda job, *_: (job.onnx, {}))
        with alone if form == "plain" else nullcontext():
            return bpu.compile_graph(graph, options, self.args.effort)

    def forms(self) -> Iterator[tuple[str, Model, onnx_ir.Model]]:
        """Every form wanted: its name, the float model it is held against, the graph."""
        form = targets.get(self.target).CAPABILITIES
        for wanted in self.args.forms:
            if wanted == "half":
                small = self.pruned()
                yield wanted, small, lower(small, form)
            else:
                yield (
                    wanted,
                    self.model,
                    export(self.model, form.opset) if wanted == "plain" else lower(self.model, form),
                )

    def pruned(self) -> Model:
        """Half: of a DeiT shape the sizes alone, of a trained model by `compress`'s pruner on the calibration images."""
        if self.trained is None:
            even = WIDTHS[self.args.size][1] % 2 == 0
            return deit(self.args.size, self.args.depth, half(self.target, heads=even))
        config, passes = half(self.target, heads=False), np.split(self.calibration, 2)
        return obs.prune(self.model, lambda: iter(passes), config, "cpu").model

    def accuracy(self, model: Model, artifact: Artifact) -> str:
        """How many images float and the artifact put in one class, and the top-1 of both in per cent."""
        if self.trained is None:
            return f"{'-':>11} {'-':>15}"
        pixels, labels = self.trained
        got = targets.get(self.target).open(artifact).run({"pixels": pixels})["logits"].argmax(1)
        wanted = torch_logits(model, pixels).argmax(1)
        same = f"{int((got == wanted).sum())}/{len(pixels)}"
        return f"{same:>11} {100 * (wanted == labels).mean():>6.2f} > {100 * (got == labels).mean():>6.2f}"


def load(model: Model, source: str, count: int) -> tuple[Array, Array]:
    """Preprocessed images and their labels."""
    images = data.open_images(source, limit=count)
    assert images.labels is not None
    return np.concatenate(list(data.batches(images, model.preprocess, 50))), np.asarray(images.labels)


# --------------------------------------------------------------------------- the table


def cost(found: _estimate.Estimate) -> tuple[float, str]:
    """What the compiler counts: milliseconds, millions of cycles, or nothing."""
    if found.latency_ms is not None:
        return found.latency_ms, "ms"
    return sum(piece.get("cycles", 0) for piece in found.subgraphs) / 1e6, "Mcycles"


def embedding(found: _estimate.Estimate) -> int:
    """The cycles of the patch embedding, where the compiler counts them by operation."""
    by_op = (op for piece in found.subgraphs for op in piece.get("cycles_by_op", {}).items())
    return sum(cycles for name, cycles in by_op if name.startswith("patch"))


def row(label: str, artifact: Artifact, seconds: float) -> str:
    found = _estimate.read(artifact)
    counted, unit = cost(found)
    size = sum(f.stat().st_size for f in artifact.files if f.suffix in (".bin", ".rknn"))
    told = f"{counted:.3f} {unit}" if counted else "-"
    return (
        f"{label:<36} {told:>15} {len(found.subgraphs):>9} {len(found.cpu_ops):>7} {100 * found.npu_mac_share:>10.1f}"
        f" {size / 1e6:>6.1f} {seconds:>7.0f}"
    )


def compare(job: Job) -> None:
    precision: Precision = job.args.precision or targets.get(job.target).CAPABILITIES.precisions[0]
    costs = {}
    for form, model, graph in job.forms():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            options = BuildOptions(Path(folder), precision, calibration=(job.calibration,))
            try:
                artifact = job.build(form, graph, options)
            except VitrimError as error:
                print(f"{f'{job.target} {job.label} {form}':<36} does not build: {error}", flush=True)
                continue
            told = row(f"{job.target} {precision} {job.label} {form}", artifact, time.perf_counter() - started)
            print(told, job.accuracy(model, artifact), flush=True)
            if "measured" in artifact.settings:
                print(f"{'':<36} int16: {artifact.settings['int16']}; {artifact.settings['measured']}", flush=True)
            found = _estimate.read(artifact)
            costs[form] = cost(found)[0]
            if cycles := embedding(found):
                print(f"{'':<36} of these the patch embedding: {cycles / 1e6:.3f} Mcycles", flush=True)
    for slow, fast in (("plain", "ours"), ("ours", "half")):
        if costs.get(slow) and costs.get(fast):
            print(f"{'':<36} {slow} / {fast}: {costs[slow] / costs[fast]:.2f}", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the DeiT shape; 0 leaves it out")
    parser.add_argument("--size", choices=WIDTHS, default="tiny")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--effort", default="O2", help="of HBDK; O0 compiles in seconds and its latency means nothing")
    parser.add_argument("--precision", choices=("w8a8", "w8a16"), help="default: what `compress` builds first")
    parser.add_argument("--model", default="demo", help="trained on the embedded images' classes")
    help_images = "evaluation images of the trained model; 0 leaves it out"
    parser.add_argument("--images", type=int, default=100, help=help_images)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    columns = f"{'estimate':>15} {'subgraphs':>9} {'CPU ops':>7} {'% MACs NPU':>10} {'MB':>6} {'build s':>7}"
    print(f"{'':<36} {columns} {'agreement':>11} {'top-1 %':>15}", flush=True)
    for name in args.target or TARGETS:
        state = targets.get(name).available()
        if not state.available:
            print(f"{name:<36} left out: {state.reason}; {state.fix}")
            continue
        if args.depth:
            noise = np.random.default_rng(1).standard_normal((2, 3, 224, 224)).astype(np.float32)
            compare(Job(name, f"DeiT-{args.size}-{args.depth}", deit(args.size, args.depth), noise, None, args))
        if args.images:
            model = checkpoint.load(args.model)
            label = "embedded" if args.model == "demo" else f"ViT-{model.spec.embed_dim}-{len(model.spec.blocks)}"
            calibration = load(model, "demo", CALIBRATION)[0]
            compare(Job(name, label, model, calibration, load(model, "demo:eval", args.images), args))


if __name__ == "__main__":
    main()
