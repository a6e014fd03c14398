#!/usr/bin/env python3
"""Train a small ViT on Fashion-MNIST on a CPU and write a folder that `vitrim` and timm read.

    apt-get install dataset-fashion-mnist
    python tools/train_vit.py --data /usr/share/datasets/fashion-mnist --out my_vit --minutes 65
    vitrim compress my_vit --data demo --target ort --out bundle

The default shape is the embedded model's (dim 192, depth 9, 3 heads). A smaller model, trained in less time:

    python tools/train_vit.py --data /usr/share/datasets/fashion-mnist --out second_vit --minutes 30 \\
        --dim 128 --depth 8 --heads 4 --opt muon --lr 2e-3 --wd 0.1 --warmup 100 --erase 0.1 --full-from 0.5

Split: the last ``--val`` images of the training set are never trained on (validation and calibration); the test set is
only reported. With ``--minutes`` the schedule follows elapsed time, so that a busy machine shortens training instead of
overrunning; with ``--epochs`` the result depends on the seed alone.

Written to ``--out`` after every epoch: config.json, model.safetensors (moving average of the weights) and log.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# glibc would give every large activation back to the system and fault it in again; it reads this when a process starts.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "200000000",
}
if __name__ == "__main__" and not MALLOC.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from vit import ViT

FASHION_LABELS = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
SHAPE = (
    ("--dim", 192, "embedding width"),
    ("--depth", 9, "blocks"),
    ("--heads", 3, "attention heads"),
    ("--patch", 4, "patch side in pixels"),
)
RECIPE = (
    ("--lr", 1e-3, "peak learning rate, cosine to zero"),
    ("--wd", 0.05, "weight decay of matrices"),
    ("--warmup", 300, "steps of linear warm-up"),
    ("--batch", 128, "images per step"),
    ("--smooth", 0.1, "label smoothing"),
    ("--erase", 0.2, "share of images with a random rectangle erased"),
    ("--pad", 2, "largest random shift in pixels"),
    ("--keep", 0.5, "share of patches seen before --full-from"),
    ("--full-from", 0.75, "share of the run after which all patches are seen"),
    ("--ema", 0.998, "decay of the moving average of the weights"),
)


def parse() -> argparse.Namespace:
    """The command line, checked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", type=Path, required=True, help="folder with the IDX files, train-images-idx3-ubyte.gz, ..."
    )
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--labels", default=FASHION_LABELS, help="class names with commas (default: Fashion-MNIST's)")
    p.add_argument(
        "--val", type=int, default=5000, help="training images held out, the last ones (default %(default)s)"
    )
    p.add_argument("--half", action="store_true", help="store float16 instead of float32")
    p.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default %(default)s)")
    length = p.add_argument_group("length").add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so long")
    length.add_argument("--epochs", type=int, help="train for so many passes")
    recipe = p.add_argument_group("recipe")
    recipe.add_argument("--opt", choices=["adamw", "muon"], default="adamw", help="muon: for the blocks' matrices only")
    for group, options in ((p.add_argument_group("shape"), SHAPE), (recipe, RECIPE)):
        for flag, default, text in options:
            group.add_argument(flag, type=type(default), default=default, help=f"{text} (default %(default)s)")
    a = p.parse_args()
    if a.dim % a.heads or a.dim % 4:
        p.error(f"--dim must be a multiple of --heads and of 4, got {a.dim} with {a.heads} heads.")
    if not a.data.is_dir():
        p.error(f"--data must be a folder, got {str(a.data)!r}; on Debian: apt-get install dataset-fashion-mnist")
    return a


# --------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Images:
    """uint8 images (N, 1, h, w) and int64 labels (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, part: slice) -> Images:
        return Images(self.x[part], self.y[part])


def read_idx(path: Path) -> Tensor:
    """The uint8 array of a gzipped IDX file."""
    with gzip.open(path, "rb") as file:
        axes = struct.unpack(">BBBB", file.read(4))[3]
        shape = struct.unpack(f">{axes}I", file.read(4 * axes))
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8).reshape(shape).copy())


def read_split(folder: Path, name: str) -> Images:
    """The ``train`` or ``t10k`` images and labels."""
    x, y = (read_idx(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    return Images(x[:, None], y.long())


def augment(x: Tensor, pad: int, erase: float, rng: torch.Generator) -> Tensor:
    """(B, C, h, w) normalised -> the same: each shifted by up to `pad`, flipped or not, some with a hole of noise."""
    b, c, h, w = x.shape
    padded = F.pad(x, (pad,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * pad + 1, (2, b), generator=rng)
    rows = (down[:, None] + torch.arange(h)).view(b, 1, h, 1)
    cols = right[:, None] + torch.arange(w)
    flip = torch.rand(b, generator=rng) < 0.5
    cols = torch.where(flip[:, None], cols.flip(1), cols).view(b, 1, 1, w)
    x = padded[torch.arange(b).view(b, 1, 1, 1), torch.arange(c).view(1, c, 1, 1), rows, cols]
    erased = torch.rand(b, generator=rng) < erase
    height = torch.randint(h // 6, h // 2 + 1, (b,), generator=rng)
    width = torch.randint(w // 6, w // 2 + 1, (b,), generator=rng)
    top = (torch.rand(b, generator=rng) * (h - height)).long()[:, None]
    left = (torch.rand(b, generator=rng) * (w - width)).long()[:, None]
    y_axis, x_axis = torch.arange(h)[None], torch.arange(w)[None]
    in_rows = (y_axis >= top) & (y_axis < top + height[:, None])
    in_cols = (x_axis >= left) & (x_axis < left + width[:, None])
    hole = (in_rows[:, :, None] & in_cols[:, None, :] & erased[:, None, None])[:, None]
    return torch.where(hole, torch.randn(x.shape, generator=rng), x)


# --------------------------------------------------------------------------- initialisation


def sincos(side: int, dim: int) -> Tensor:
    """2-D sine-cosine positions (side * side, dim)."""
    frequency = 1.0 / 100 ** (torch.arange(dim // 4).float() / (dim // 4))
    angle = torch.arange(side).float()[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows, cols = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, cols], -1).reshape(side * side, dim)


@torch.no_grad()
def initialise(model: ViT, side: int, heads: int) -> None:
    """Sine-cosine positions, and attention that starts near Wq' Wk ~ 0.7 I, Wv Wproj ~ -0.4 I.

    Source: Trockman and Kolter 2023 (mimetic initialisation), arXiv 2305.09828.
    """
    dim = model.pos_embed.shape[2]
    model.pos_embed[0, 1:] = 0.5 * sincos(side, dim)
    width = dim // heads
    for block in model.blocks:
        qkv = block.attn.qkv.weight
        for i in range(heads):
            u, s, v = torch.linalg.svd(0.7 * torch.randn(dim, dim) / dim**0.5 + 0.7 * torch.eye(dim))
            root = s[:width].sqrt()
            qkv[i * width : (i + 1) * width] = (u[:, :width] * root).T
            qkv[dim + i * width : dim + (i + 1) * width] = root[:, None] * v[:width]
        u, s, v = torch.linalg.svd(0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * torch.eye(dim))
        block.attn.proj.weight.copy_(u * s.sqrt())
        qkv[2 * dim :] = s.sqrt()[:, None] * v


# --------------------------------------------------------------------------- training


def optimisers(model: ViT, a: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW, with Muon for the blocks' matrices when asked for; biases, norms and tokens do not decay."""
    muon = {n: p for n, p in model.named_parameters() if a.opt == "muon" and p.ndim == 2 and n.startswith("blocks.")}
    rest = [p for n, p in model.named_parameters() if n not in muon]
    groups = [
        {"params": [p for p in rest if p.ndim in (2, 4)], "weight_decay": a.wd},
        {"params": [p for p in rest if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, a.lr, betas=(0.9, 0.99), fused=True)]
    if muon:
        found.append(torch.optim.Muon(muon.values(), a.lr, a.wd, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return found


class Trainer:
    """One training run; `step` does one batch, `average` is the model that is kept."""

    def __init__(self, train: Images, a: argparse.Namespace) -> None:
        self.train, self.a, self.steps = train, a, 0
        self.mean, self.std = train.x.float().mean() / 255, train.x.float().std() / 255
        self.rng = torch.Generator().manual_seed(a.seed)
        side, classes = train.x.shape[2], int(train.y.max()) + 1
        self.model = ViT(side, a.patch, 1, classes, a.dim, a.depth, a.heads)
        initialise(self.model, side // a.patch, a.heads)
        self.average = copy.deepcopy(self.model)
        self.optimisers = optimisers(self.model, a)
        self.start = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        if self.a.minutes is not None:
            return (time.monotonic() - self.start) / (60 * self.a.minutes)
        return self.steps / (len(self.train) // self.a.batch * self.a.epochs)

    def pixels(self, x: Tensor) -> Tensor:
        """uint8 -> normalised float32."""
        return (x.float() / 255 - self.mean) / self.std

    def step(self, batch: Images) -> float:
        """One update; the loss before it."""
        a, progress = self.a, self.progress
        rate = a.lr * min(1, self.steps / a.warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1, progress))) + 1e-6
        for group in (g for o in self.optimisers for g in o.param_groups):
            group["lr"] = rate
        x = augment(self.pixels(batch.x), a.pad, a.erase, self.rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(x, a.keep if progress < a.full_from else 1.0)
        loss = F.cross_entropy(logits.float(), batch.y, label_smoothing=a.smooth)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.steps += 1
        decay = min(a.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item()

    def epoch(self) -> tuple[float, int]:
        """One pass in random order, cut short when the time is over: mean loss and images seen."""
        order = torch.randperm(len(self.train), generator=self.rng)
        losses = []
        for chosen in order.split(self.a.batch):
            if len(chosen) < self.a.batch or self.progress >= 1:
                break
            losses.append(self.step(Images(self.train.x[chosen], self.train.y[chosen])))
            if self.steps % 100 == 0:
                print(f"  step {self.steps}  {self.progress:.1%}  loss {np.mean(losses[-100:]):.4f}", file=sys.stderr)
        return float(np.mean(losses)) if losses else math.nan, len(losses) * self.a.batch

    @torch.no_grad()
    def accuracy(self, images: Images) -> float:
        """Top-1 of the averaged model, in bfloat16 autocast."""
        right = 0
        for i in range(0, len(images), 500):
            part = images[i : i + 500]
            with torch.autocast("cpu", torch.bfloat16):
                right += int((self.average(self.pixels(part.x)).argmax(1) == part.y).sum())
        return right / len(images)


# --------------------------------------------------------------------------- output


def config(trainer: Trainer, labels: list[str]) -> dict[str, object]:
    """config.json as timm's hub layout has it."""
    a, side = trainer.a, trainer.train.x.shape[2]
    shape = {
        "img_size": side,
        "patch_size": a.patch,
        "in_chans": 1,
        "embed_dim": a.dim,
        "depth": a.depth,
        "num_heads": a.heads,
    }
    return {
        "architecture": "vit_tiny_patch16_224",  # timm's class; every size comes from model_args
        "num_classes": len(labels),
        "num_features": a.dim,
        "model_args": {**shape, "num_classes": len(labels)},
        "pretrained_cfg": {
            "input_size": [1, side, side],
            "mean": [float(trainer.mean)],
            "std": [float(trainer.std)],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": len(labels),
            "label_names": labels,
        },
    }


def write(trainer: Trainer, labels: list[str]) -> None:
    """config.json and model.safetensors, each replaced in one move."""
    a = trainer.a
    dtype = torch.float16 if a.half else torch.float32
    weights = {name: w.detach().to(dtype).contiguous() for name, w in trainer.average.state_dict().items()}
    (a.out / "model.tmp").write_bytes(save(weights, metadata={"format": "pt"}))
    os.replace(a.out / "model.tmp", a.out / "model.safetensors")
    (a.out / "config.tmp").write_text(json.dumps(config(trainer, labels), indent=1) + "\n")
    os.replace(a.out / "config.tmp", a.out / "config.json")


def main() -> None:
    """Train, and after every epoch write the model and a line of log.jsonl."""
    a = parse()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    everything, test = read_split(a.data, "train"), read_split(a.data, "t10k")
    trainer = Trainer(everything[: -a.val], a)
    labels = a.labels.split(",")
    if len(labels) != trainer.model.head.out_features:
        sys.exit(f"--labels: must have {trainer.model.head.out_features} names, got {len(labels)}.")
    a.out.mkdir(parents=True, exist_ok=True)
    while trainer.progress < 1:
        start = time.monotonic()
        loss, seen = trainer.epoch()
        if seen == 0:
            break
        speed = round(seen / (time.monotonic() - start))
        last = trainer.progress >= 0.999
        checked = {  # a glance while training, everything at the end
            "val": trainer.accuracy(everything[-a.val :] if last else everything[-min(a.val, 1000) :]),
            "test": trainer.accuracy(test if last else test[:2000]),
        }
        write(trainer, labels)
        record = {
            "steps": trainer.steps,
            "progress": round(min(1, trainer.progress), 4),
            "loss": round(loss, 4),
            **checked,
            "images_per_s": speed,
        }
        with (a.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(json.dumps(record))


if __name__ == "__main__":
    main()
