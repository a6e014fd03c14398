"""A small plain pre-norm Vision Transformer for training, in timm's tensor names.

timm's ``VisionTransformer`` with the same ``img_size``, ``patch_size``, ``in_chans``, ``embed_dim``, ``depth``,
``num_heads`` and ``num_classes`` loads its state dict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ViT"]

NORM_EPS = 1e-6  # timm's
MLP_RATIO = 4


class PatchEmbed(nn.Module):
    """(B, in, h, w) -> (B, N, C)."""

    def __init__(self, patch: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention, written out: on a CPU the backward pass of torch's fused kernel is far slower at 50 tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1).to(v.dtype)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, c))


class Mlp(nn.Module):
    """Two linears with GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attn(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The network; the head reads the class token."""

    def __init__(self, image: int, patch: int, in_chans: int, classes: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, NORM_EPS)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, keep: float = 1.0) -> Tensor:
        """(B, in, h, w) -> (B, classes), looking at a random share `keep` of the patches of each image.

        Source: Liu et al. 2022 (PatchDropout), arXiv 2208.07220.
        """
        patches = self.patch_embed(x) + self.pos_embed[:, 1:]
        if keep < 1:
            b, n, c = patches.shape
            kept = torch.rand(b, n).argsort(1)[:, : int(n * keep)]
            patches = patches.gather(1, kept[..., None].expand(-1, -1, c))
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1).to(patches.dtype)
        return self.head(self.norm(self.blocks(torch.cat([token, patches], 1)))[:, 0])
