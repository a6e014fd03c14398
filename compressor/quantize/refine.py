"""Sequential quantization: each layer is refitted to the inputs it gets from the quantized layers before it.

Two streams run side by side through the blocks: the reference network's, in float, and the quantized one's. At each linear
layer, in execution order:

    0. outlier channels move from its input into its weights, where that helps clearly      (equalize)
    1. the grid of its input is chosen by the error it makes in the layer's output          (ranges)
    2. its weights are refitted so that quantized inputs give what the reference gives      (regression)
    3. the weights are rounded, each column's error undone by the columns left              (rounding)
    4. its bias takes what remains on average

For ``proj`` and ``fc2`` "what the reference gives" is the reference's residual stream, so they also undo what earlier blocks
left; that is the zero-cost form of the low-rank branch of TAPTQ, folded into weights that are there anyway. Everything is
weighted by the importance of the token (importance).

The reference is the network that is quantized, pruned or not. A pruned one is fitted to the unpruned one already: regressing
towards that again, in one pass or in two, helps some and harms others (bench/results/quantization-demo.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ConfigError, DataError
from compressor.quantize.equalize import EXPONENTS, equalize, fold
from compressor.quantize.grid import fake_quant_torch
from compressor.quantize.importance import Importance
from compressor.quantize.plan import QuantizeConfig, weight_grid
from compressor.quantize.ranges import fit_grid, sample_rows
from compressor.quantize.regression import Fit, Regression
from compressor.quantize.rounding import Rounding, second_order
from compressor.types import PRECISION_BITS, Array, Model, QParams, Quantization, Width
from compressor.vit import Block, Tap, VisionTransformer, to_torch

__all__ = ["LayerReport", "RefineConfig", "Refined", "refine"]

PARTNERS = 128  # tokens whose scores with a token judge its grid


@dataclass(frozen=True)
class RefineConfig:
    """How a model is refined.

    Args:
        grid: bits, exceptions, scale search, sites with a zero point.
        dampings: candidate ridge strengths of the refit, as shares of the mean input variance; empty: weights are only
            rounded and biases corrected.
        rounding: `second_order`, or another of `compressor.quantize.rounding`.
        tokens_per_image: cap on the tokens of an image that enter the sums, None for all; every prefix token and one patch
            enter whatever it says.
        sample_images: how many images the activation grids are chosen on.
        exponents: candidates of equalisation; empty: none.
    """

    grid: QuantizeConfig = field(default_factory=QuantizeConfig)
    dampings: tuple[float, ...] = (0.01, 0.1, 1.0)
    rounding: Rounding = second_order
    tokens_per_image: int | None = 96
    sample_images: int = 64
    exponents: tuple[float, ...] = EXPONENTS

    def __post_init__(self) -> None:
        if any(not 0 < d < math.inf for d in self.dampings):
            raise ConfigError(f"RefineConfig.dampings must be positive and finite, got {self.dampings}.")
        if any(not 0 <= a <= 1 for a in self.exponents):
            raise ConfigError(f"RefineConfig.exponents must lie between 0 and 1, got {self.exponents}.")
        if self.sample_images < 1 or (self.tokens_per_image is not None and self.tokens_per_image < 1):
            raise ConfigError("RefineConfig.sample_images and tokens_per_image must be at least 1.")


@dataclass(frozen=True)
class LayerReport:
    """What was done to one linear layer.

    `damping` None: its weights were kept, held-out images preferred them; `exponent` None: its input was not equalised.
    """

    name: str
    damping: float | None
    quantized: bool
    exponent: float | None = None


@dataclass(frozen=True, eq=False)
class Refined:
    """A model whose quantized weights lie on their grids, those grids, and what was done per layer."""

    model: Model
    quantization: Quantization
    layers: tuple[LayerReport, ...]
    scores: Mapping[str, QParams] = field(default_factory=dict)  # grids of q and k, where q k^T could run in int8

    def with_scores(self) -> Quantization:
        """The grids with those of q and k, for a target that multiplies them in integers."""
        return replace(self.quantization, activations={**self.quantization.activations, **self.scores})


def refine(
    model: Model,
    batches: Iterable[Array],
    config: RefineConfig,
    importance: Importance,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Refined:
    """`model` quantized and compensated in one sequential pass over calibration images.

    Two token streams (images, T, C) are held, and the input of one layer at a time, for all images; both in float32.

    Args:
        model: the float model, pruned or not.
        batches: float32 arrays (B, C, h, w).
        config: see `RefineConfig`.
        importance: from `compressor.quantize.importance.token_importance` of `model`.
        progress: called with (blocks done, blocks).

    Raises:
        DataError: no image.

    Source: asymmetric calibration as in GPTAQ (arXiv 2504.02692) and ERQ (arXiv 2407.06794); new here are the token
    weights, the residual target and the held-out choice of the ridge.
    """
    with torch.inference_mode():
        walk = _Walk(model, list(batches), config, importance)
        walk.embed()
        for i in range(len(model.spec.blocks)):
            walk.attention(i)
            walk.mlp(i)
            progress(i + 1, len(model.spec.blocks))
        if model.spec.num_classes:
            walk.classify()
    return walk.result()


@dataclass(frozen=True, eq=False)
class _Site:
    """One site: its inputs by batch, the linears that read it in groups of equal importance, and what they should give.

    `read(j)` is (B, tokens, I). With `inner` the target is the input the reference has there, seen through the layers' own
    weights; otherwise `target(j)` is the output itself, (B, tokens, O).
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    read: Callable[[int], Tensor]
    target: Callable[[int], Tensor]
    inner: bool
    first_token: int = 0


class _Walk:
    """The two streams and the modules they run through; the quantized one changes as the walk proceeds."""

    def __init__(self, model: Model, batches: list[Array], config: RefineConfig, importance: Importance) -> None:
        if not sum(map(len, batches)):
            raise DataError("refine: calibration data must hold at least one image, got none.")
        self.model, self.config, self.importance = model, config, importance
        self.module, self.reference = to_torch(model), to_torch(model)
        self.pixels = [torch.from_numpy(batch) for batch in batches]
        self.batches = len(batches)
        self.dense: list[Tensor] = []
        self.small: list[Tensor] = []
        self.weights: dict[str, QParams] = {}
        self.activations: dict[str, QParams] = {}
        self.scores: dict[str, QParams] = {}
        self.reports: list[LayerReport] = []
        self.exponents: dict[str, float] = {}

    def embed(self) -> None:
        """Patch embedding; starts both streams."""
        kernel, stride = self.model.spec.patch_size, self.model.spec.patch_size

        def patches(j: int) -> Tensor:
            return F.unfold(self.pixels[j], kernel, stride=stride).transpose(1, 2)

        self._layers(
            _Site("patch", (("patch",),), patches, patches, inner=True, first_token=self.model.spec.prefix_tokens)
        )
        self.dense = [self.reference.embed(pixels) for pixels in self.pixels]
        self.small = [self.module.embed(pixels, self._tap) for pixels in self.pixels]
        self.pixels = []

    def attention(self, i: int) -> None:
        """Block i up to the residual addition of its attention branch."""
        name, block, reference = f"blocks.{i}", self._block(i), self._block(i, self.reference)
        self._normed(f"{name}.qkv", f"{name}.norm1", (f"{name}.q",), (f"{name}.k", f"{name}.v"))
        if f"{name}.qkv" in self.activations and not block.spec.qk_norm:
            self._scores(name, block)
        self._branch(f"{name}.proj", partial(block.attention, name=name), reference.attention)

    def mlp(self, i: int) -> None:
        """Block i from there to its end."""
        name, block, reference = f"blocks.{i}", self._block(i), self._block(i, self.reference)
        leaves = ("fc1", "gate") if block.spec.mlp == "swiglu" else ("fc1",)
        self._normed(f"{name}.fc1", f"{name}.norm2", tuple(f"{name}.{leaf}" for leaf in leaves))
        self._branch(f"{name}.fc2", partial(block.mlp, name=name), reference.mlp)

    def classify(self) -> None:
        """The classifier, on pooled tokens; its target are the reference's logits."""
        pooled = [_input(self.module.classify, tokens, self._tap, "head")[:, None] for tokens in self.small]
        logits = [self.reference.classify(tokens)[:, None] for tokens in self.dense]
        self._layers(_Site("head", (("head",),), pooled.__getitem__, logits.__getitem__, inner=False))

    def result(self) -> Refined:
        """What the walk left behind."""
        weights = {name: p.numpy() for name, p in self.module.state_dict().items()}
        quantization = Quantization(self.weights, self.activations, self.config.grid.precision)
        model = self.model.with_weights(self.model.spec, weights)
        return Refined(model, quantization, tuple(self.reports), self.scores)

    # ----------------------------------------------------------------- one layer

    def _normed(self, name: str, source: str, *groups: tuple[str, ...]) -> None:
        """The linears of site `name`, which read the stream through the norm `source`."""
        norm = self.module.get_submodule(source)
        site = _Site(name, groups, lambda j: norm(self.small[j]), lambda j: norm(self.dense[j]), inner=True)
        self._equalize(site, source)
        self._layers(site)

    def _branch(self, name: str, small: Callable[[Tensor, Tap], Tensor], dense: Callable[[Tensor], Tensor]) -> None:
        """The last linear of a branch: its output closes the gap between the streams, and joins the quantized one."""
        inputs = [_input(small, tokens, self._tap, name) for tokens in self.small]
        for tokens in self.dense:
            tokens += dense(tokens)
        site = _Site(name, ((name,),), inputs.__getitem__, lambda j: self.dense[j] - self.small[j], inner=False)
        if name.endswith(".proj"):
            factor = self._equalize(site, name.removesuffix("proj") + "v")
            for x in inputs:
                x /= factor
        self._layers(site)
        linear = self.module.get_submodule(name)
        for tokens, x in zip(self.small, inputs, strict=True):
            tokens += linear(self._tap(name, x))

    def _equalize(self, site: _Site, source: str) -> Tensor:
        """The factors folded into the linears of `site` and into `source`, which nothing else reads; ones where none are."""
        names = [n for group in site.groups for n in group]
        integer = [self._weight(n) for n in names if not self.config.grid.is_skipped(f"{n}.weight")]
        if not (integer and self.config.exponents) or self.config.grid.weight_only:
            return torch.ones(())
        stacked = torch.cat(integer).numpy()
        rows = sample_rows(*self._sample(site), outputs=len(stacked))
        found = equalize(rows, stacked, site.name, self.config.grid, self.config.exponents)
        if found.exponent is not None:
            fold(self.module, source, names, found.factor)
            self.exponents |= dict.fromkeys(names, found.exponent)
            if (q := self.weights.get(f"{source}.weight")) is not None:  # v is on its grid, which moves with it
                self.weights[f"{source}.weight"] = replace(q, scale=q.scale / found.factor)
        return torch.from_numpy(found.factor)

    def _layers(self, site: _Site) -> None:
        """Quantize the linears of `site`: grid, refit, rounding, bias."""
        weights = {n: self._weight(n) for group in site.groups for n in group}
        integer = [n for n in weights if not self.config.grid.is_skipped(f"{n}.weight")]
        weight_bits, activation_bits = PRECISION_BITS[self.config.grid.precision]
        if integer and not self.config.grid.weight_only:
            stacked = torch.cat([weights[n] for n in integer]).numpy()
            rows = sample_rows(*self._sample(site), outputs=len(stacked))
            asymmetric = self.config.grid.is_asymmetric(site.name)
            self.activations[site.name] = fit_grid(
                rows, activation_bits, stacked, self.config.grid.search, asymmetric=asymmetric
            )
        for group in site.groups:
            regression = self._accumulate(site, group)
            for name in group:
                weight = weights[name].double()
                fit = regression.fit(weight, self.config.dampings, weight if site.inner else None)
                self._install(name, fit, inner=site.inner, bits=None if name not in integer else weight_bits)

    def _scores(self, name: str, block: Block) -> None:
        """Grids of q and k in block `name`, each chosen by the error it makes in their product; in 8 bits, as its kernel is.

        They are not part of this walk: the layers behind are fitted to the product in float. The bias of k, which no softmax
        sees, would only widen its grid: it goes.
        """
        assert block.k.bias is not None
        block.k.bias = nn.Parameter(torch.zeros_like(block.k.bias), requires_grad=False)
        rows = {}
        for part, linear in ((f"{name}.q", block.q), (f"{name}.k", block.k)):
            read = partial(self._product, linear, f"{name}.qkv", block.norm1)
            site = _Site(part, ((part,),), read, read, inner=True)
            rows[part] = sample_rows(*self._sample(site), outputs=linear.out_features)
        for part, other in ((f"{name}.q", f"{name}.k"), (f"{name}.k", f"{name}.q")):
            few = rows[other][:: max(1, len(rows[other]) // PARTNERS)]
            heads = np.repeat(np.eye(block.spec.heads, dtype=np.float32), block.spec.qk_dim, axis=1)
            across = (heads[:, None] * few).reshape(
                -1, few.shape[1]
            )  # (heads * partners, H * D): x has the scores across @ x
            self.scores[part] = fit_grid(rows[part], 8, across, self.config.grid.search, asymmetric=False)

    def _product(self, linear: nn.Linear, site: str, norm: Callable[[Tensor], Tensor], j: int) -> Tensor:
        """What `linear` makes of batch j of the quantized stream."""
        return linear(self._tap(site, norm(self.small[j])))  # type: ignore[no-any-return]

    def _accumulate(self, site: _Site, group: tuple[str, ...]) -> Regression:
        """Sums of the inputs as quantized against the targets, weighted by token, in two halves of the images."""
        sums: Regression | None = None
        index, weight = self._tokens(site, group)
        seen = 0
        for j in range(self.batches):
            x, y = self._tap(site.name, site.read(j)[:, index]), site.target(j)[:, index]
            sums = sums or Regression(x.mean((0, 1)), y.shape[2])
            for half in (0, 1):
                part = slice((half + seen) % 2, None, 2)
                sums.add(half, x[part].flatten(0, 1), y[part].flatten(0, 1), weight.repeat(len(x[part])))
            seen += len(x)
        assert sums is not None
        return sums

    def _install(self, name: str, fit: Fit, *, inner: bool, bits: Width | None) -> None:
        """Put the refitted, rounded weights of one linear into the module."""
        linear = self.module.get_submodule(name)
        assert isinstance(linear, nn.Linear | nn.Conv2d) and linear.bias is not None
        weight = fit.weight
        if bits is not None:
            grid, energy = self.config.grid, fit.gram.diagonal().numpy()
            q = weight_grid(weight.float().numpy(), bits, grid.search, energy, grid.group)
            weight = self.config.rounding(weight, fit.gram, q)
            self.weights[f"{name}.weight"] = q
        bias = fit.bias(weight) + (linear.bias.double() if inner else 0)
        linear.weight = nn.Parameter(weight.float().reshape(linear.weight.shape), requires_grad=False)
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
        report = LayerReport(f"{name}.weight", fit.damping, bits is not None, self.exponents.get(name))
        self.reports.append(report)

    # ----------------------------------------------------------------- what a layer reads

    def _sample(self, site: _Site) -> tuple[Array, Array]:
        """Inputs of `site` (n, I) from the first images, and the importance (n,) of each row."""
        index, weight = self._tokens(site, tuple(name for group in site.groups for name in group))
        rows: list[Tensor] = []
        for j in range(self.batches):
            rows.append(site.read(j)[: self.config.sample_images - sum(map(len, rows)), index])
            if sum(map(len, rows)) >= self.config.sample_images:
                break
        inputs = torch.cat(rows)
        return inputs.flatten(0, 1).numpy(), weight.repeat(len(inputs)).numpy()

    def _tokens(self, site: _Site, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Which tokens of an image are read, (n,), and how much each counts: every prefix token, patches at even strides."""
        spec = self.model.spec
        if site.name == "head":
            return torch.tensor([0]), torch.ones(1)
        prefix, patches = spec.prefix_tokens, spec.tokens - spec.prefix_tokens
        limit = self.config.tokens_per_image
        count = patches if limit is None else min(patches, max(1, limit - prefix))
        index = torch.cat([torch.arange(prefix), prefix + torch.arange(count) * patches // count])
        known = [self.importance[name] for name in names if name in self.importance]
        weight = (torch.stack(known).mean(0) if known else torch.ones(spec.tokens))[index]
        weight[prefix:] *= patches / count
        keep = index >= site.first_token
        return index[keep] - site.first_token, weight[keep]

    def _tap(self, site: str, x: Tensor) -> Tensor:
        return fake_quant_torch(x, self.activations[site]) if site in self.activations else x

    def _weight(self, name: str) -> Tensor:
        return self.module.get_parameter(f"{name}.weight").flatten(1)

    def _block(self, i: int, module: VisionTransformer | None = None) -> Block:
        block = (module or self.module).blocks[i]
        assert isinstance(block, Block)
        return block


def _input(branch: Callable[[Tensor, Tap], Tensor], tokens: Tensor, tap: Tap, site: str) -> Tensor:
    """What `site` receives when `branch` runs on `tokens`; the linear behind it gets nothing, so it costs nothing."""
    seen: list[Tensor] = []

    def stop(at: str, x: Tensor) -> Tensor:
        if at != site:
            return tap(at, x)
        seen.append(x)
        return x[:0]

    branch(tokens, stop)
    return seen[0]
