"""The token layout (B, T, C): the graph general-purpose runtimes execute fast.

Exact simplifications, each an identity of the network and none visible in the outputs:

1. Prefix tokens and positions are one constant table: ``Pad(patches) + [prefix; pos]``, for any batch size.
2. The bias of k adds the same number to every logit of a softmax row: dropped (unless k is normalized or rounded first).
3. Softmax rows sum to one, so the bias of v passes through attention: in float it moves into proj's bias.
   (Quantized, it stays: proj's input grid was calibrated with it, and its weights are not these yet.)
4. A head that reads tokens 0..p-1 only needs those rows of the last block's queries, projection and MLP.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compressor.errors import ConfigError
from compressor.lower.activations import activation
from compressor.lower.graph import CONTRIB, GraphBuilder
from compressor.lower.patches import columns, cropped, halved, pixels_shape
from compressor.lower.qdq import Linears, opset
from compressor.types import BlockSpec, Capabilities, Model, Quantization

__all__ = ["lower_tokens"]

POOLED_ROWS = {"token": 1, "token_dist": 2}  # pools that read only the first tokens


def lower_tokens(model: Model, capabilities: Capabilities, quantization: Quantization | None) -> ir.Model:
    """The ONNX graph of `model` on tokens: ``pixels`` (batch, in, h, w) -> ``logits`` (batch, classes), float32.

    The patch form "columns" takes ``pixels`` (batch, h, w, in) where rows are a multiple of 16; with ``logits="map"`` the
    output is (batch, classes, 1, 1).
    """
    emitter = _Tokens(model, capabilities, quantization)
    spec, g = model.spec, emitter.graph
    pixels = g.input("pixels", pixels_shape(spec, capabilities))
    x = emitter.embed(pixels)
    rows = POOLED_ROWS.get(spec.pool, spec.tokens)
    for i, block in enumerate(spec.blocks):
        last = i == len(spec.blocks) - 1
        x = emitter.block(f"blocks.{i}", block, x, rows if last else spec.tokens)
    logits = emitter.classify(x, rows)
    return g.finish("vitrim", logits, emitter.shape)


class _Tokens:
    """The emitter's state: the graph so far, the model, and how its target wants each operator."""

    def __init__(self, model: Model, capabilities: Capabilities, quantization: Quantization | None) -> None:
        self.spec = model.spec
        self.weights = model.weights
        self.form = capabilities
        batch: str | int = "batch" if capabilities.batch == "dynamic" else 1
        self.graph = GraphBuilder(opset(capabilities, quantization), batch)
        self.linears = Linears(self.graph, model.weights, capabilities, quantization)
        classes = self.spec.num_classes or self.spec.pooled_dim
        self.shape = (classes, 1, 1) if capabilities.logits == "map" else (classes,)  # of the logits, behind the batch

    # ------------------------------------------------------------------ embedding

    def embed(self, pixels: ir.Value) -> ir.Value:
        """(B, *pixels) -> (B, T, C)."""
        g, spec = self.graph, self.spec
        x = self.linears.input("patch", pixels, "patch")
        patches = self._patch_matmul(x) if self.form.patch == "unshuffle" else self._patch_conv(x)
        if spec.prefix_tokens:
            pads = g.ints("tokens.pads", [0, spec.prefix_tokens, 0, 0, 0, 0])
            patches = g.op("tokens.pad", "Pad", patches, pads)
        table = np.concatenate([self.weights["prefix"], self.weights["pos"] + self.weights["patch.bias"]])
        return g.op("tokens.add", "Add", patches, g.constant("tokens.table", table[None]))

    def _patch_conv(self, x: ir.Value) -> ir.Value:
        g, (rows, cols), c = self.graph, self.spec.grid, self.spec.embed_dim
        split = {"halving": halved, "columns": columns}.get(self.form.patch)
        if split:
            if self.linears.stored("patch"):
                raise ConfigError(
                    f"Capabilities.patch of a quantized graph must be conv or unshuffle, got {self.form.patch!r}."
                )
            x = split(g, self.spec, x, self.weights["patch.weight"], self.form.patch_stride)
        else:
            x = self.linears.conv("patch", "patch", x)  # (B, C, rows, cols)
        return g.op("patch.transpose", "Transpose", g.reshape("patch.flat", x, (c, rows * cols)), perm=(0, 2, 1))

    def _patch_matmul(self, x: ir.Value) -> ir.Value:
        g, spec, (rows, cols), (p, q) = self.graph, self.spec, self.spec.grid, self.spec.patch_size
        x = g.reshape("patch.split", cropped(g, spec, x), (spec.in_chans, rows, p, cols, q))
        x = g.op("patch.unshuffle", "Transpose", x, perm=(0, 2, 4, 1, 3, 5))
        x = g.reshape("patch.flat", x, (rows * cols, spec.in_chans * p * q))
        return self.linears.matmul("patch", "patch", x, ("patch",), None)

    # ------------------------------------------------------------------ blocks

    def block(self, name: str, block: BlockSpec, x: ir.Value, rows: int) -> ir.Value:
        """(B, T, C) -> (B, rows, C): the first `rows` tokens leaving the block."""
        g = self.graph
        y = self._norm(f"{name}.norm1", x)
        if rows < self.spec.tokens:
            x = g.slice(f"{name}.rows", x, 1, 0, rows)
        x = g.op(f"{name}.attn", "Add", x, self._attention(name, block, y, rows))
        y = self._norm(f"{name}.norm2", x)
        return g.op(f"{name}.mlp", "Add", x, self._mlp(name, block, y))

    def _attention(self, name: str, block: BlockSpec, y: ir.Value, rows: int) -> ir.Value:
        fold = not self.linears.stored(f"{name}.proj")
        q, k, v = self._qkv(name, block, y, rows, fold)
        core = self._fused_attention if self.form.attention == "fused" else self._matmul_attention
        o = core(name, block, q, k, v, rows)
        bias = self.weights[f"{name}.proj.bias"]
        if fold:
            bias = bias + self.weights[f"{name}.proj.weight"] @ self.weights[f"{name}.v.bias"]
        o = self.linears.input(f"{name}.proj", o, f"{name}.proj")
        return self.linears.matmul(f"{name}.proj", f"{name}.proj", o, (f"{name}.proj",), bias)

    def _qkv(self, name: str, block: BlockSpec, y: ir.Value, rows: int, fold: bool) -> tuple[ir.Value, ...]:
        """q (B, rows, H * D), k (B, T, H * D), v (B, T, H * Dv); `fold`: the bias of v is added later, with proj's."""
        g, site = self.graph, f"{name}.qkv"
        parts = tuple(f"{name}.{part}" for part in "qkv")
        bias = {part: self.weights[f"{part}.bias"] for part in parts}
        if not block.qk_norm and not self.linears.rounds(parts[1]):
            bias[parts[1]] = np.zeros_like(bias[parts[1]])
        if fold:
            bias[parts[2]] = np.zeros_like(bias[parts[2]])
        full = self.linears.input(site, y, *parts)
        if self.form.qkv == "packed" and rows == self.spec.tokens:
            x = self.linears.matmul(site, site, full, parts, np.concatenate([bias[part] for part in parts]))
            sizes = [len(bias[part]) for part in parts]
            return g.ops(f"{site}.split", "Split", parts, x, g.ints(f"{site}.sizes", sizes), axis=-1)
        some = full
        if rows < self.spec.tokens:
            some = g.slice(f"{site}.rows", full, 1, 0, rows)
        reads = (some, full, full)
        return tuple(
            self.linears.matmul(part, site, x, (part,), bias[part]) for part, x in zip(parts, reads, strict=True)
        )

    def _matmul_attention(
        self, name: str, block: BlockSpec, q: ir.Value, k: ir.Value, v: ir.Value, rows: int
    ) -> ir.Value:
        g, t = self.graph, self.spec.tokens
        q = self._heads(f"{name}.q", block, self.linears.rounded(f"{name}.q", q), rows)
        k = self._heads(f"{name}.k", block, self.linears.rounded(f"{name}.k", k), t)
        v = g.reshape(f"{name}.v.heads", v, (t, block.heads, block.v_dim))
        q, k, v = (g.op(f"{x.name}.transpose", "Transpose", x, perm=(0, 2, 1, 3)) for x in (q, k, v))  # (B, H, T, D)
        if self.form.equal_heads:
            q, k, v = (self._widened(x, d, block) for x, d in ((q, block.qk_dim), (k, block.qk_dim), (v, block.v_dim)))
        k = g.op(f"{name}.k.transpose", "Transpose", k, perm=(0, 1, 3, 2))  # (B, H, D, T)
        scores = g.op(f"{name}.scores", "MatMul", q, k)
        o = g.op(f"{name}.values", "MatMul", g.op(f"{name}.softmax", "Softmax", scores, axis=3), v)
        if self.form.equal_heads and block.v_dim < _head_width(block):
            o = g.slice(f"{name}.values.cut", o, 3, 0, block.v_dim)
        o = g.op(f"{name}.heads.transpose", "Transpose", o, perm=(0, 2, 1, 3))
        return g.reshape(f"{name}.heads", o, (rows, block.heads * block.v_dim))

    def _widened(self, x: ir.Value, width: int, block: BlockSpec) -> ir.Value:
        """(B, H, T, width) -> (B, H, T, `_head_width`), zeros behind."""
        missing = _head_width(block) - width
        if not missing:
            return x
        return self.graph.op(f"{x.name}.pad", "Pad", x, self.graph.ints(f"{x.name}.pads", [0] * 7 + [missing]))

    def _fused_attention(
        self, name: str, block: BlockSpec, q: ir.Value, k: ir.Value, v: ir.Value, rows: int
    ) -> ir.Value:
        g, t, width = self.graph, self.spec.tokens, block.heads * block.qk_dim
        if block.qk_norm:
            q = g.reshape(f"{name}.q.rows", self._heads(f"{name}.q", block, q, rows), (rows, width))
            k = g.reshape(f"{name}.k.rows", self._heads(f"{name}.k", block, k, t), (t, width))
        inputs = (q, k, v)
        return g.op(
            f"{name}.attention", "MultiHeadAttention", *inputs, domain=CONTRIB, num_heads=block.heads, scale=1.0
        )

    def _heads(self, name: str, block: BlockSpec, x: ir.Value, rows: int) -> ir.Value:
        """q or k by heads, (B, rows, H * D) -> (B, rows, H, D), normalized where the block does so."""
        x = self.graph.reshape(f"{name}.heads", x, (rows, block.heads, block.qk_dim))
        return self._norm(f"{name}_norm", x) if block.qk_norm else x

    def _mlp(self, name: str, block: BlockSpec, y: ir.Value) -> ir.Value:
        g, site = self.graph, f"{name}.fc1"
        gated = block.mlp == "swiglu"
        parts = (f"{name}.fc1", f"{name}.gate") if gated else (f"{name}.fc1",)
        y = self.linears.input(site, y, *parts)
        hidden, *gate = (self.linears.matmul(part, site, y, (part,), self.weights[f"{part}.bias"]) for part in parts)
        act = activation(g, f"{name}.act", block.mlp, self.form.gelu, gate[0] if gated else hidden)
        hidden = g.op(f"{name}.gated", "Mul", act, hidden) if gated else act
        hidden = self.linears.input(f"{name}.fc2", hidden, f"{name}.fc2")
        return self.linears.matmul(
            f"{name}.fc2", f"{name}.fc2", hidden, (f"{name}.fc2",), self.weights[f"{name}.fc2.bias"]
        )

    # ------------------------------------------------------------------ operators

    def _norm(self, name: str, x: ir.Value) -> ir.Value:
        """LayerNorm over the last axis: one node where the opset has it."""
        g, eps = self.graph, self.spec.norm_eps
        scale, shift = (g.constant(f"{name}.{part}", self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        if g.opset >= 17:
            return g.op(name, "LayerNormalization", x, scale, shift, axis=-1, epsilon=eps)
        centred = g.op(f"{name}.centre", "Sub", x, g.op(f"{name}.mean", "ReduceMean", x, axes=(-1,)))
        variance = g.op(f"{name}.variance", "ReduceMean", g.op(f"{name}.square", "Mul", centred, centred), axes=(-1,))
        deviation = g.op(f"{name}.sqrt", "Sqrt", g.op(f"{name}.eps", "Add", variance, g.floats("norm_eps", eps)))
        return g.op(
            name, "Add", g.op(f"{name}.scale", "Mul", g.op(f"{name}.div", "Div", centred, deviation), scale), shift
        )

    # ------------------------------------------------------------------ pooling and head

    def classify(self, x: ir.Value, rows: int) -> ir.Value:
        """(B, rows, C) -> (B, classes), or (B, pooled) without a classifier; as a map, (B, classes, 1, 1)."""
        g, spec = self.graph, self.spec
        pooled = self._pool(x, rows)
        last = "logits" if self.form.logits == "matrix" else "logits.matrix"
        if spec.num_classes:
            pooled = self.linears.input("head", pooled, "head")
            head = self.linears.matmul("head", "head", pooled, ("head",), None)
            logits = g.op(last, "Add", head, g.constant("head.bias", self.weights["head.bias"]))
        else:
            logits = g.op(last, "Identity", pooled)
        return logits if self.form.logits == "matrix" else g.reshape("logits", logits, self.shape)

    def _pool(self, x: ir.Value, rows: int) -> ir.Value:
        g, spec = self.graph, self.spec
        if spec.pool in POOLED_ROWS:  # a norm after pooling reads the same single row
            return g.reshape("pool", self._norm("norm", x), (rows * spec.embed_dim,))
        if not spec.norm_after_pool:
            x = self._norm("norm", x)
        patches = x if not spec.prefix_tokens else g.slice("pool.patches", x, 1, spec.prefix_tokens, spec.tokens)
        mean = self._mean("pool.mean", patches)
        if spec.pool == "token_avg":
            token = g.reshape("pool.token", g.slice("pool.first", x, 1, 0, 1), (spec.embed_dim,))
            return g.op("pool", "Concat", token, mean, axis=1)
        return self._norm("norm", mean) if spec.norm_after_pool else mean

    def _mean(self, name: str, x: ir.Value) -> ir.Value:
        g = self.graph
        if g.opset >= 18:
            return g.op(name, "ReduceMean", x, g.ints(f"{name}.axes", [1]), keepdims=0)
        return g.op(name, "ReduceMean", x, axes=(1,), keepdims=0)


def _head_width(block: BlockSpec) -> int:
    """Of q, k and v alike, where kernels want that: the larger of the two, to the next multiple of 8, and not below 16."""
    return -(-max(block.qk_dim, block.v_dim, 16) // 8) * 8
