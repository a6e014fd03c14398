"""Which units go first. A saliency is a pure function to one score per unit or dimension; the lowest are removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MLP_SALIENCIES", "QK_SALIENCIES", "MlpSaliency", "QkSaliency", "split"]

MlpSaliency = Literal["energy", "weight_magnitude", "energy_weightmagnitude"]
QkSaliency = Literal["same_token", "all_pairs"]


def energy(energy: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """E[x_i^2], (M,)."""
    del w_in, w_out  # Unused
    return energy


def weight_magnitude(energy: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """||fc1 row i|| * ||fc2 column i||, (M,)."""
    del energy  # Unused
    return w_in * w_out


def energy_weightmagnitude(energy: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """E[x_i^2] * ||fc1 row i|| * ||fc2 column i||, (M,). Source: CORP (arXiv 2602.05243), the drivers' default."""
    return energy * w_in * w_out


# (energy E[x_i^2], norm of the input rows, norm of the output column), each (M,) -> score (M,)
MLP_SALIENCIES: Mapping[MlpSaliency, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "energy": energy,
    "weight_magnitude": weight_magnitude,
    "energy_weightmagnitude": energy_weightmagnitude,
}


def same_token(pair_energy: Tensor, q_energy: Tensor, k_energy: Tensor) -> Tensor:
    """Sum of q_j^2 k_j^2 over tokens, (H, D): query and key of the SAME token. Source: CORP as released."""
    del q_energy, k_energy  # Unused
    return pair_energy


def all_pairs(pair_energy: Tensor, q_energy: Tensor, k_energy: Tensor) -> Tensor:
    """Sum of q_j^2 times sum of k_j^2, (H, D): the dimension's energy in logits, which pair different tokens."""
    del pair_energy  # Unused
    return q_energy * k_energy


# (sum of q_j^2 k_j^2, sum of q_j^2, sum of k_j^2), each (H, D) -> score (H, D)
QK_SALIENCIES: Mapping[QkSaliency, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "same_token": same_token,
    "all_pairs": all_pairs,
}


def split(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices (..., keep) of the highest scores and (..., rest) of the others, both ascending; ties keep the later
    unit.

    >>> [part.tolist() for part in split(torch.tensor([3.0, 1.0, 2.0]), 2)]
    [[0, 2], [1]]
    """
    order = torch.argsort(score, dim=-1, stable=True)
    removed = score.shape[-1] - keep
    return order[..., removed:].sort(-1).values, order[..., :removed].sort(-1).values
