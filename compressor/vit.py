"""The network as a torch module in canonical names, with one mechanism to look inside: the tap.

`forward(pixels, tap)` calls ``tap(site, tensor)`` at every site and continues with what it returns. Observing statistics,
simulating quantization and replacing an input are all taps; there are no hooks and no module surgery.

Sites (B batch, T tokens, C width, H heads, D head width, M MLP width):

    patch               (B, in, h, w)   pixels, input of the patch embedding
    blocks.i            (B, T, C)       residual stream entering block i
    blocks.i.qkv        (B, T, C)       input of the q, k and v linears (output of norm1)
    blocks.i.q / k / v  (B, H, T, D)    their outputs, before any q/k norm; the softmax scale is already inside q
    blocks.i.proj       (B, T, H * Dv)  input of the attention output projection
    blocks.i.attn       (B, T, C)       output of the attention branch, before the residual addition
    blocks.i.fc1        (B, T, C)       input of fc1 (and of gate)
    blocks.i.fc2        (B, T, M)       input of fc2: the MLP's hidden units after the activation
    blocks.i.mlp        (B, T, C)       output of the MLP branch, before the residual addition
    head                (B, pooled)     input of the classifier
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.types import BlockSpec, MlpKind, Model, VitSpec

__all__ = ["Block", "Tap", "VisionTransformer", "build", "no_tap", "to_torch"]

Tap = Callable[[str, Tensor], Tensor]


def no_tap(site: str, x: Tensor) -> Tensor:
    """The tap that neither looks nor changes."""
    del site  # Unused
    return x


ACTIVATIONS: dict[MlpKind, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swiglu": F.silu,  # of the gate; the product with fc1's output follows
}


class Block(nn.Module):
    """Pre-norm block: x + attn(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, spec: BlockSpec, dim: int, eps: float) -> None:
        super().__init__()
        self.spec = spec
        qk, v = spec.heads * spec.qk_dim, spec.heads * spec.v_dim
        self.norm1 = nn.LayerNorm(dim, eps)
        self.q, self.k, self.v = nn.Linear(dim, qk), nn.Linear(dim, qk), nn.Linear(dim, v)
        if spec.qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(spec.qk_dim, eps), nn.LayerNorm(spec.qk_dim, eps)
        self.proj = nn.Linear(v, dim)
        self.norm2 = nn.LayerNorm(dim, eps)
        if spec.mlp == "swiglu":
            self.gate = nn.Linear(dim, spec.mlp_dim)
        self.fc1, self.fc2 = nn.Linear(dim, spec.mlp_dim), nn.Linear(spec.mlp_dim, dim)

    def forward(self, x: Tensor, tap: Tap = no_tap, name: str = "block") -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = tap(name, x)
        x = x + tap(f"{name}.attn", self.attention(x, tap, name))
        return x + tap(f"{name}.mlp", self.mlp(x, tap, name))

    def attention(self, x: Tensor, tap: Tap = no_tap, name: str = "block") -> Tensor:
        """Output of the attention branch, (B, T, C) -> (B, T, C), before the residual addition."""
        y = tap(f"{name}.qkv", self.norm1(x))
        q, k, v = (tap(f"{name}.{part}", self._heads(getattr(self, part)(y))) for part in ("q", "k", "v"))
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        o = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # (B, H, T, Dv); the scale lives in q's weights
        return self.proj(tap(f"{name}.proj", o.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.spec.heads, -1).transpose(1, 2)  # (B, T, H * D) -> (B, H, T, D)

    def mlp(self, x: Tensor, tap: Tap = no_tap, name: str = "block") -> Tensor:
        """Output of the MLP branch, (B, T, C) -> (B, T, C), before the residual addition."""
        y = tap(f"{name}.fc1", self.norm2(x))
        act = ACTIVATIONS[self.spec.mlp]
        hidden = act(self.gate(y)) * self.fc1(y) if self.spec.mlp == "swiglu" else act(self.fc1(y))
        return self.fc2(tap(f"{name}.fc2", hidden))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """The whole network; parameter names are those of `VitSpec.shapes`."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.spec = spec
        c = spec.embed_dim
        self.patch = nn.Conv2d(spec.in_chans, c, spec.patch_size, spec.patch_size)
        self.prefix = nn.Parameter(torch.zeros(spec.prefix_tokens, c))
        self.pos = nn.Parameter(torch.zeros(spec.grid[0] * spec.grid[1], c))
        self.blocks = nn.ModuleList(Block(b, c, spec.norm_eps) for b in spec.blocks)
        self.norm = nn.LayerNorm(c, spec.norm_eps)
        self.head = nn.Linear(spec.pooled_dim, spec.num_classes) if spec.num_classes else nn.Identity()

    def embed(self, pixels: Tensor, tap: Tap = no_tap) -> Tensor:
        """(B, in, h, w) -> (B, T, C): patches with positions, behind the prefix tokens."""
        patches = self.patch(tap("patch", pixels)).flatten(2).transpose(1, 2) + self.pos
        return torch.cat([self.prefix.expand(len(pixels), -1, -1), patches], dim=1)

    def classify(self, x: Tensor, tap: Tap = no_tap) -> Tensor:
        """(B, T, C) -> (B, classes), or (B, pooled) when there is no classifier."""
        return self.head(tap("head", self._pool(x)))  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor, tap: Tap = no_tap) -> Tensor:
        """(B, in, h, w) preprocessed pixels -> (B, classes) logits."""
        x = self.embed(pixels, tap)
        for i, block in enumerate(self.blocks):
            x = block(x, tap, f"blocks.{i}")
        return self.classify(x, tap)

    def _pool(self, x: Tensor) -> Tensor:
        spec = self.spec
        if not spec.norm_after_pool:
            x = self.norm(x)
        token, patches = x[:, 0], x[:, spec.prefix_tokens :].mean(1)
        pooled = {
            "token": lambda: token,
            "avg": lambda: patches,
            "token_dist": lambda: torch.cat([token, x[:, 1]], dim=1),
            "token_avg": lambda: torch.cat([token, patches], dim=1),
        }[spec.pool]()
        return self.norm(pooled) if spec.norm_after_pool else pooled


def build(spec: VitSpec) -> VisionTransformer:
    """A randomly initialised module of `spec`, in eval mode."""
    return VisionTransformer(spec).eval()


def to_torch(model: Model, device: torch.device | str = "cpu") -> VisionTransformer:
    """`model` as a torch module in eval mode, without gradients, on `device`."""
    module = VisionTransformer(model.spec)
    module.load_state_dict({name: torch.from_numpy(w) for name, w in model.weights.items()}, assign=True)
    return module.requires_grad_(requires_grad=False).eval().to(device)
