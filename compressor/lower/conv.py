"""The convolutional layout (B, C, 1, T): the same network for chips that multiply matrices in 1x1 convolutions only.

Horizon's BPU takes 4-D tensors, reduces over channels by convolution alone, and pads the last axis to a multiple of 8: tokens
go there. Exact steps, each a function of `conv_folds` or an identity of the network:

1. Linear -> 1x1 convolution with inherited weights; q, k and v apart, so that nothing is gathered or split.
2. The channel mean is subtracted inside the writers of the residual stream, and a LayerNorm's affine moves into the
   convolutions that read it. What is left of it: one square, one C -> 1 convolution (eps is its bias), one power, one product.
3. The bias of k changes no softmax and is dropped; the bias of v moves into proj's.
4. Prefix tokens and positions are one constant table. A head that reads tokens 0..p-1 only needs those columns of the last
   block, and reading p tokens side by side is a 1 x p convolution.
5. ``softmax="exp"``: exp(s - max s), its sum as one more row of the values, a reciprocal and a product behind them. Any
   number may be subtracted from a row; the maximum is what int8 needs: without it one row's largest exp sets the scale of all
   of them (D-Robotics' mapper, embedded model: cosine of the first block's attention 0.30 without, 0.998 with).

Source: Tang and Guo, "ViT on Brain Processing Unit", arXiv 2602.06300, for linears and norms as convolutions with inherited
weights; the paper gives no code. The centring fold, the table and the softmax are ours.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compressor.errors import ConfigError
from compressor.lower import conv_folds as folds
from compressor.lower.activations import activation
from compressor.lower.graph import GraphBuilder
from compressor.lower.patches import cropped, halved, strided
from compressor.types import Array, BlockSpec, Capabilities, Model, Quantization

__all__ = ["lower_conv"]

POOLED_ROWS = {"token": 1, "token_dist": 2}  # pools that read only the first tokens


def lower_conv(model: Model, capabilities: Capabilities, quantization: Quantization | None) -> ir.Model:
    """The ONNX graph of `model` in 4-D: ``pixels`` (batch, in, h, w) -> ``logits`` (batch, classes), float32.

    With ``logits="map"`` they are (batch, classes, 1, 1).

    Raises:
        ConfigError: a quantization (the chips' compilers quantize this form themselves), an opset below 11, or patches that
            SpaceToDepth cannot cut.
    """
    if quantization is not None:
        raise ConfigError("Capabilities.layout 'conv' must be lowered in float, got a quantization.")
    if capabilities.opset < 11:
        raise ConfigError(f"Capabilities.opset of layout 'conv' must be at least 11, got {capabilities.opset}.")
    if capabilities.patch == "columns":
        raise ConfigError("Capabilities.patch of layout 'conv' must be conv, unshuffle or halving, got 'columns'.")
    emitter = _Conv(model, capabilities)
    spec, g = model.spec, emitter.graph
    x = emitter.embed(g.input("pixels", (spec.in_chans, *spec.image_size)))
    rows = POOLED_ROWS.get(spec.pool, spec.tokens)
    for i, block in enumerate(spec.blocks):
        x = emitter.block(f"blocks.{i}", block, x, rows if i == len(spec.blocks) - 1 else spec.tokens)
    classes = spec.num_classes or spec.pooled_dim
    return g.finish("vitrim", emitter.classify(x), (classes, 1, 1) if capabilities.logits == "map" else (classes,))


class _Conv:
    """The emitter's state: the graph so far, the weights in float64, and how the target wants each operator."""

    def __init__(self, model: Model, capabilities: Capabilities) -> None:
        self.spec = model.spec
        self.weights = {name: np.asarray(w, dtype=np.float64) for name, w in model.weights.items()}
        self.form = capabilities
        self.graph = GraphBuilder(capabilities.opset, "batch" if capabilities.batch == "dynamic" else 1)

    def _conv(self, name: str, x: ir.Value, kernel: Array, bias: Array | None = None, group: int = 1) -> ir.Value:
        """One convolution with stride 1 and float32 constants; a bias of zeros is left out."""
        g = self.graph
        inputs = [x, g.constant(f"{name}.weight", kernel.astype(np.float32))]
        if bias is not None and bias.any():
            inputs.append(g.constant(f"{name}.bias", bias.astype(np.float32)))
        return g.op(f"{name}.conv", "Conv", *inputs, kernel_shape=list(kernel.shape[2:]), group=group)

    def _linear(self, name: str) -> tuple[Array, Array]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    # ------------------------------------------------------------------ embedding

    def embed(self, pixels: ir.Value) -> ir.Value:
        """(B, in, h, w) -> (B, C, 1, T), zero mean over C."""
        g, spec = self.graph, self.spec
        weight, bias = folds.centre(*self._linear("patch"))
        x = g.reshape("patch.flat", self._patches(pixels, weight), (spec.embed_dim, 1, spec.grid[0] * spec.grid[1]))
        if spec.prefix_tokens:
            pads = g.ints("tokens.pads", [0, 0, 0, spec.prefix_tokens, 0, 0, 0, 0])
            x = g.op("tokens.pad", "Pad", x, pads)
        table = np.concatenate([self.weights["prefix"], self.weights["pos"]])
        table -= table.mean(axis=1, keepdims=True)
        table[spec.prefix_tokens :] += bias
        return g.op("tokens.add", "Add", x, g.constant("tokens.table", table.T[None, :, None, :].astype(np.float32)))

    def _patches(self, x: ir.Value, weight: Array) -> ir.Value:
        """(B, in, h, w) -> (B, C, rows, cols), in the chip's form."""
        g, spec, p = self.graph, self.spec, self.spec.patch_size[0]
        if self.form.patch == "conv":
            return strided(g, x, weight)
        if self.form.patch == "halving":
            return halved(g, spec, x, weight, self.form.patch_stride)
        if spec.patch_size[1] != p:
            raise ConfigError(f"Patches must be square for patch form 'unshuffle', got {spec.patch_size}.")
        x = g.op("patch.unshuffle", "SpaceToDepth", cropped(g, spec, x), blocksize=p)
        return self._conv("patch", x, folds.patch_kernel(weight))

    # ------------------------------------------------------------------ blocks

    def block(self, name: str, block: BlockSpec, x: ir.Value, rows: int) -> ir.Value:
        """(B, C, 1, T) -> (B, C, 1, rows): the first `rows` tokens leaving the block."""
        g = self.graph
        full = self._normalize(f"{name}.norm1", x)
        some = full
        if rows < self.spec.tokens:
            some = g.slice(f"{name}.norm1.rows", full, 3, 0, rows)
            x = g.slice(f"{name}.rows", x, 3, 0, rows)
        x = g.op(f"{name}.attn", "Add", x, self._attention(name, block, some, full, rows))
        return g.op(f"{name}.mlp", "Add", x, self._mlp(name, block, self._normalize(f"{name}.norm2", x)))

    def _normalize(self, name: str, x: ir.Value, heads: int = 0, width: int = 0) -> ir.Value:
        """``x (mean x^2 + eps)^-1/2`` over the channels of a centred x; over each of `heads` runs of them where given."""
        g, eps = self.graph, self.spec.norm_eps
        mean = folds.mean_kernel(heads or 1, width or self.spec.embed_dim, spread=heads > 0)
        square = g.op(f"{name}.square", "Mul", x, x)
        power = self._conv(f"{name}.power", square, mean, np.full(len(mean), eps))
        inverse = g.op(f"{name}.inverse", "Pow", power, g.floats("norm.exponent", -0.5))
        return g.op(name, "Mul", x, inverse)

    def _reader(self, name: str, norm: str) -> tuple[Array, Array]:
        """Weight and bias of a linear that reads the normalized stream, with the norm's affine inside."""
        return folds.absorb_affine(*self._linear(name), self.weights[f"{norm}.weight"], self.weights[f"{norm}.bias"])

    def _attention(self, name: str, block: BlockSpec, some: ir.Value, full: ir.Value, rows: int) -> ir.Value:
        g, t, h, exp = self.graph, self.spec.tokens, block.heads, self.form.softmax == "exp"
        q, k = self._queries(name, block, some), self._keys(name, block, full)
        value_weight, value_bias = self._reader(f"{name}.v", f"{name}.norm1")
        weight, sums, scale = folds.with_sums(value_weight, h) if exp else (value_weight, None, 1.0)
        v = self._conv(f"{name}.v", full, folds.kernel(weight), sums)
        groups, first = (h, 1) if exp else (1, h)
        q = self._regroup(f"{name}.q.heads", q, groups, (first, block.qk_dim, rows))
        k = self._regroup(f"{name}.k.heads", k, groups, (first, block.qk_dim, t))
        v = self._regroup(f"{name}.v.heads", v, groups, (first, len(weight) // h, t))
        core = self._exp_attention if exp else self._softmax_attention
        o = g.reshape(f"{name}.heads", core(name, (h, block.v_dim, rows), q, k, v), (h * block.v_dim, 1, rows))
        weight, bias = self._linear(f"{name}.proj")
        weight, bias = folds.centre(scale * weight, folds.value_bias_into_projection(weight, bias, value_bias))
        return self._conv(f"{name}.proj", o, folds.kernel(weight), bias)

    def _queries(self, name: str, block: BlockSpec, x: ir.Value) -> ir.Value:
        weight, bias = self._reader(f"{name}.q", f"{name}.norm1")
        if not block.qk_norm:
            return self._conv(f"{name}.q", x, folds.kernel(weight), bias)
        weight, bias = folds.centre_heads(weight, bias, block.heads)
        q = self._conv(f"{name}.q", x, folds.kernel(weight), bias)
        q = self._normalize(f"{name}.q_norm", q, block.heads, block.qk_dim)
        affine = (self.weights[f"{name}.{part}"] for part in ("q_norm.weight", "q_norm.bias", "k_norm.weight"))
        scale, shift = (np.tile(part, block.heads) for part in folds.key_scale_into_query(*affine))
        return self._conv(f"{name}.q_norm.affine", q, scale[:, None, None, None], shift, group=len(scale))

    def _keys(self, name: str, block: BlockSpec, x: ir.Value) -> ir.Value:
        weight, bias = self._reader(f"{name}.k", f"{name}.norm1")
        if block.qk_norm:
            weight, bias = folds.centre_heads(weight, bias, block.heads)
            k = self._conv(f"{name}.k", x, folds.kernel(weight), bias)
            return self._normalize(f"{name}.k_norm", k, block.heads, block.qk_dim)
        return self._conv(f"{name}.k", x, folds.kernel(weight))

    def _regroup(self, name: str, x: ir.Value, groups: int, shape: tuple[int, ...]) -> ir.Value:
        """`x` as (B * groups, *shape)."""
        batch = self.graph.batch
        lead = groups * batch if isinstance(batch, int) else -1
        return self.graph.op(name, "Reshape", x, self.graph.ints(f"{name}.shape", [lead, *shape]))

    def _softmax_attention(
        self, name: str, sizes: tuple[int, int, int], q: ir.Value, k: ir.Value, v: ir.Value
    ) -> ir.Value:
        """(B, H, D, rows), (B, H, D, T), (B, H, Dv, T) -> (B, H, Dv, rows): softmax over the last axis, as chips have it."""
        del sizes  # Unused
        g = self.graph
        scores = g.op(f"{name}.scores", "MatMul", g.op(f"{name}.q.transpose", "Transpose", q, perm=(0, 1, 3, 2)), k)
        attention = g.op(f"{name}.softmax", "Softmax", scores, axis=3)
        o = g.op(f"{name}.values", "MatMul", attention, g.op(f"{name}.v.transpose", "Transpose", v, perm=(0, 1, 3, 2)))
        return g.op(f"{name}.heads.transpose", "Transpose", o, perm=(0, 1, 3, 2))

    def _exp_attention(self, name: str, sizes: tuple[int, int, int], q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """(BH, 1, D, rows), (BH, 1, D, T), (BH, 1, Dv + 1, T) -> (B, H, Dv, rows), without a softmax node.

        Heads lie on the batch axis and queries become channels: with heads as channels, three of them were padded to eight. A
        row's maximum is a pooling over its keys, and the last row of the values becomes the sum that it is divided by.
        """
        g, t, (h, width, rows) = self.graph, self.spec.tokens, sizes
        scores = g.op(f"{name}.scores", "MatMul", g.op(f"{name}.q.transpose", "Transpose", q, perm=(0, 1, 3, 2)), k)
        scores = self._regroup(f"{name}.scores.rows", scores, h, (rows, 1, t))
        centred = g.op(f"{name}.centred", "Sub", scores, self._peak(f"{name}.peak", scores))
        e = g.op(f"{name}.exp", "Exp", centred)  # in (0, 1]: int8 is enough
        e = self._regroup(f"{name}.exp.rows", e, h, (1, rows, t))
        o = g.op(f"{name}.values", "MatMul", e, g.op(f"{name}.v.transpose", "Transpose", v, perm=(0, 1, 3, 2)))
        o = g.op(f"{name}.values.transpose", "Transpose", o, perm=(0, 1, 3, 2))
        o = self._regroup(f"{name}.values.heads", o, 1, (h, width + 1, rows))
        inverse = g.op(f"{name}.inverse", "Reciprocal", g.slice(f"{name}.sum", o, 2, width, width + 1))
        return g.op(f"{name}.divided", "Mul", g.slice(f"{name}.weighted", o, 2, 0, width), inverse)

    def _peak(self, name: str, scores: ir.Value) -> ir.Value:
        """(BH, rows, 1, T) -> (BH, rows, 1, 1): the largest score of each row, by poolings that follow each other."""
        x, left = scores, self.spec.tokens
        for i, window in enumerate(folds.pooling_windows(left)):
            missing = -left % window  # minus infinity to a maximum
            x = self.graph.op(
                f"{name}{i}", "MaxPool", x, kernel_shape=(1, window), strides=(1, window), pads=(0, 0, 0, missing)
            )
            left = (left + missing) // window
        return x

    def _mlp(self, name: str, block: BlockSpec, y: ir.Value) -> ir.Value:
        g, norm = self.graph, f"{name}.norm2"
        weight, bias = self._reader(f"{name}.fc1", norm)
        hidden = self._conv(f"{name}.fc1", y, folds.kernel(weight), bias)
        if block.mlp == "swiglu":
            weight, bias = self._reader(f"{name}.gate", norm)
            gate = self._conv(f"{name}.gate", y, folds.kernel(weight), bias)
            hidden = g.op(f"{name}.gated", "Mul", activation(g, f"{name}.act", block.mlp, self.form.gelu, gate), hidden)
        else:
            hidden = activation(g, f"{name}.act", block.mlp, self.form.gelu, hidden)
        weight, bias = folds.centre(*self._linear(f"{name}.fc2"))
        return self._conv(f"{name}.fc2", hidden, folds.kernel(weight), bias)

    # ------------------------------------------------------------------ pooling and head

    def classify(self, x: ir.Value) -> ir.Value:
        """(B, C, 1, rows) -> (B, classes), or (B, pooled) without a classifier; the last norm's affine is in the head.

        The chips' form of it is the map (B, classes, 1, 1): the reshape would be their only operation on the CPU.
        """
        g, spec = self.graph, self.spec
        width = spec.num_classes or spec.pooled_dim
        weight, bias = self._linear("head") if spec.num_classes else (np.eye(width), np.zeros(width))
        read = spec.pooled_dim // spec.embed_dim
        scale, shift = (np.tile(self.weights[f"norm.{part}"], read) for part in ("weight", "bias"))
        weight, bias = folds.absorb_affine(weight, bias, scale, shift)
        pooled = self._pool(x) if spec.norm_after_pool else self._pool(self._normalize("norm", x))
        if spec.norm_after_pool:
            pooled = self._normalize("norm", pooled)
        logits = self._conv("head", pooled, folds.head_kernel(weight, read), bias)
        if self.form.logits == "matrix":
            return g.reshape("logits", logits, (width,))
        logits.name = "logits"
        return logits

    def _pool(self, x: ir.Value) -> ir.Value:
        """(B, C, 1, rows) -> (B, C, 1, 1 or 2): what the head reads, side by side."""
        g, spec = self.graph, self.spec
        if spec.pool in POOLED_ROWS:
            return x
        patches = g.slice("pool.patches", x, 3, spec.prefix_tokens, spec.tokens) if spec.prefix_tokens else x
        mean = g.op("pool.mean", "GlobalAveragePool", patches)
        if spec.pool == "avg":
            return mean
        return g.op("pool", "Concat", g.slice("pool.token", x, 3, 0, 1), mean, axis=3)
