"""How much an error at each token matters to the prediction: the diagonal of the downstream Jacobian, without labels.

In a network that reads its class token, an error on that token in the last block changes the answer and an error on any
other token changes nothing; a sum over tokens that treats them alike optimises noise. Every objective of this package
is weighted by the table made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compressor.errors import DataError
from compressor.linalg import require_finite
from compressor.types import Array
from compressor.vit import VisionTransformer

__all__ = ["Importance", "token_importance"]

Importance = Mapping[str, Tensor]  # weight name without ".weight" -> (T,) float32 with mean 1
OUTPUTS = {"q": ("q",), "k": ("k",), "v": ("v",), "attn": ("proj",), "fc2": ("fc1", "gate"), "mlp": ("fc2",)}
FLOOR = 0.1  # share of the weight spread evenly, so that no token is free to be ruined


def token_importance(module: VisionTransformer, batches: Iterable[Array], *, seed: int = 0) -> dict[str, Tensor]:
    """Weight of each token's error in the output of each linear layer, (T,) with mean 1; the classifier has none.

    For a class y drawn from the model's own prediction p, E[g g^T] with g = d log p(y) / dz is J^T F J: the Fisher
    matrix of the prediction pulled back to z, which is the curvature of the KL divergence. Its diagonal is summed over the
    channels of a token and averaged over images. One forward and one backward pass; gradients are not kept.

    Args:
        module: the float network.
        batches: float32 arrays (B, C, h, w); 64 images are plenty, the table has only T numbers per layer.
        seed: of the drawn classes.

    Raises:
        DataError: no image, or an output that is not finite.

    Source: label-free form of the Hessian-guided objective of arXiv 2111.12293 (PTQ4ViT), which keeps the gradient of each
    element; averaging it over images is what makes it usable in a closed form. For ``fc1`` the gradient at the
    hidden units stands for the one before the activation.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for name, energy in _energies(module, torch.from_numpy(batch).to(module.pos.device), generator).items():
            sums[name] = sums[name] + energy if name in sums else energy
    if not sums:
        raise DataError("Token importance must be measured on at least one image, got none.")
    return {name: FLOOR + (1 - FLOOR) * _normalised(total) for name, total in sums.items()}


def _normalised(total: Tensor) -> Tensor:
    mean = total.mean()
    return total / mean if mean > 0 else torch.ones_like(total)


def _energies(module: VisionTransformer, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """(T,) squared gradient at the output of each linear, summed over images and channels."""
    sums: dict[str, Tensor] = {}

    def watch(site: str, x: Tensor) -> Tensor:
        block, _, part = site.rpartition(".")
        names = [f"{block}.{leaf}" for leaf in OUTPUTS.get(part, ())] if block else []
        if part == "0" and block == "blocks":
            names = ["patch"]
        if not names:
            return x
        if not x.requires_grad:
            x = x.detach().requires_grad_()

        def add(grad: Tensor) -> None:
            energy = grad.square().sum((0, 1, 3) if grad.ndim == 4 else (0, 2))  # (B, H, T, D) or (B, T, C)
            sums.update(dict.fromkeys(names, energy))

        x.register_hook(add)  # type: ignore[no-untyped-call]
        return x

    with torch.enable_grad():
        output = module(pixels, watch)
        require_finite(output.detach())
        if module.spec.num_classes > 1:
            drawn = torch.multinomial(output.detach().softmax(1).cpu(), 1, generator=generator).to(output.device)
            score = output.log_softmax(1).gather(1, drawn).sum()
        else:  # features, or one number: every direction counts alike
            score = (output * torch.randn(output.shape, generator=generator).to(output.device)).sum()
        score.backward()
    return sums
