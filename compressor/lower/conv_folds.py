"""The algebra of the convolutional form: each fold is one pure function on float64 weights and leaves the outputs as they are.

Notation: W (out, in), b (out,), C channels of the residual stream x, D head width, P = I - 11^T/C (subtracts the channel mean).
"""

from __future__ import annotations

import numpy as np

from compressor.types import Array

__all__ = [
    "absorb_affine",
    "centre",
    "centre_heads",
    "head_kernel",
    "kernel",
    "key_scale_into_query",
    "mean_kernel",
    "patch_kernel",
    "pooling_windows",
    "unshuffle",
    "unshuffle_kernel",
    "value_bias_into_projection",
    "with_sums",
]


def centre(weight: Array, bias: Array) -> tuple[Array, Array]:
    """P W and P b: a writer of the residual stream whose output has zero mean over channels.

    Every reader of the stream is a LayerNorm, which subtracts that mean anyway: LN(x) = LN(P x). When every writer is centred,
    so is x, and LayerNorm needs no mean: LN(x) = x (mean_c x^2 + eps)^-1/2 gamma + beta. `weight` (C, ...), `bias` (C, ...).
    """
    return weight - weight.mean(axis=0, keepdims=True), bias - bias.mean(axis=0, keepdims=True)


def absorb_affine(weight: Array, bias: Array, scale: Array, shift: Array) -> tuple[Array, Array]:
    """W diag(scale) and b + W shift: ``W (n scale + shift) + b`` without the affine, `weight` (out, in)."""
    return weight * scale, bias + weight @ shift


def centre_heads(weight: Array, bias: Array, heads: int) -> tuple[Array, Array]:
    """`centre` for each head apart: the writers of a normalized query or key, `weight` (heads * D, in)."""
    rows, shift = weight.reshape(heads, -1, weight.shape[1]), bias.reshape(heads, -1)
    centred = rows - rows.mean(axis=1, keepdims=True), shift - shift.mean(axis=1, keepdims=True)
    return centred[0].reshape(weight.shape), centred[1].reshape(bias.shape)


def key_scale_into_query(q_scale: Array, q_shift: Array, k_scale: Array) -> tuple[Array, Array]:
    """The affine of a normalized query that makes the key's unnecessary; all (D,).

    (g_q n_q + b_q) . (g_k n_k + b_k) = (g_k g_q n_q + g_k b_q) . n_k + (g_q n_q + b_q) . b_k, and the last term is the same
    for every key, so a softmax over keys does not see it.
    """
    return q_scale * k_scale, q_shift * k_scale


def value_bias_into_projection(weight: Array, bias: Array, value_bias: Array) -> Array:
    """b + W b_v: rows of a softmax sum to one, so attention passes the bias of v on unchanged; `weight` (C, heads * D)."""
    return np.asarray(bias + weight @ value_bias)


def with_sums(weight: Array, heads: int) -> tuple[Array, Array, float]:
    """(H Dv, C) -> (H (Dv + 1), C), its bias, and c: the values of every head with a last row that is c for every token.

    Behind the exponentials e of a row of scores that row is c sum(e), what the others are divided by, so that the sum costs no
    product of its own: c (V e) / (c 1 e) = V softmax(s), and c moves into the projection. On an int8 grid that the row shares
    with the values its error is that of c, so c is three standard deviations of a value of normalized tokens. Embedded model,
    integers throughout, divergence from float: 0.0027 with c = 1, 0.0020 with this, 0.0022 with a product for the sums.
    """
    rows, c = weight.reshape(heads, -1, weight.shape[1]), 3.0 * float(np.sqrt((weight**2).sum(axis=1).mean()))
    c = c if c > 0 else 1.0  # values that are all 0: nothing shares the grid with the row
    ones = np.zeros((heads, rows.shape[1] + 1))
    ones[:, -1] = c
    return np.pad(rows, ((0, 0), (0, 1), (0, 0))).reshape(-1, weight.shape[1]), ones.ravel(), c


def kernel(weight: Array) -> Array:
    """(out, in) -> (out, in, 1, 1): a linear layer on tokens is a 1x1 convolution on (B, in, 1, T)."""
    return weight[:, :, None, None]


def mean_kernel(groups: int, width: int, *, spread: bool) -> Array:
    """The 1x1 kernel that averages each of `groups` runs of `width` channels.

    ``spread`` writes the mean back to every channel of its run, (groups * width, groups * width, 1, 1), so that no broadcast
    follows; otherwise there is one channel per group, as a grouped convolution (groups, width, 1, 1).
    """
    if not spread:
        return np.full((groups, width, 1, 1), 1.0 / width)
    return kernel(np.kron(np.eye(groups), np.full((width, width), 1.0 / width)))


def patch_kernel(weight: Array) -> Array:
    """(C, in, p, p) -> (C, p * p * in, 1, 1): the patch embedding behind ONNX SpaceToDepth(p), whose channels run (y, x, in)."""
    return kernel(weight.transpose(0, 2, 3, 1).reshape(len(weight), -1))


def unshuffle(image: Array, rows: int, cols: int) -> Array:
    """(..., c, rows * h, cols * w) -> (..., rows * cols * c, h, w), whose channels run (y, x, c) as ONNX SpaceToDepth's do.

    A strided patch embedding of an image is one of the smaller image with the smaller kernel, whatever the strides' other
    factors: both put pixel (rows * y + i, cols * x + j) of channel k at (y, x) of channel (cols * i + j) c + k.
    """
    *lead, c, h, w = image.shape
    parts = np.moveaxis(image.reshape(*lead, c, h // rows, rows, w // cols, cols), (-3, -1), (-5, -4))
    return np.asarray(parts.reshape(*lead, rows * cols * c, h // rows, w // cols))


def unshuffle_kernel(channels: int, rows: int, cols: int) -> Array:
    """(rows cols c, c, rows, cols) of zeros and ones: `unshuffle` as a convolution with that stride, exact in any precision."""
    places = np.eye(rows * cols).reshape(-1, 1, rows, cols)  # one kernel per (y, x)
    kernels = np.einsum("pqyx,oc->pocyx", places, np.eye(channels))
    return np.asarray(kernels.reshape(-1, channels, rows, cols))


def head_kernel(weight: Array, rows: int) -> Array:
    """(classes, rows * C) -> (classes, C, 1, rows): a classifier over `rows` tokens side by side is one 1 x rows convolution."""
    return weight.reshape(len(weight), rows, -1).transpose(0, 2, 1)[:, :, None, :]


def pooling_windows(count: int) -> tuple[int, ...]:
    """Windows, each as long as its stride, of poolings that reduce `count` values to one, in halves first.

    Any windows give the same maximum; chips pool neighbours in pairs fast. HBDK at O2, 197 keys, microseconds of two DeiT-Tiny
    blocks and one that classifies, when heads were channels: 2301 with (15, 14), 1957 with (2, 10, 10), 1908 with
    (2, 2, 2, 5, 5), 1830 with these.

    >>> pooling_windows(197)  # 99, 50, 25, 13, 1
    (2, 2, 2, 2, 13)
    """
    windows = []
    while count > 16:
        windows.append(2)
        count = -(-count // 2)
    return (*windows, count)
