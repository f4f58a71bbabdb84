"""Losses over logits, with unknown voxels left out."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastorgan.labels import IGNORE

VOXELS_AT_ONCE = 16384
"""On a CPU."""


def focal(logits: Tensor, codes: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017), the paper's: mean of (1 - p)^gamma times cross-entropy.

    Args:
        logits: (N, C, D, H, W).
        codes: (N, D, H, W) int64 classes; `IGNORE` is left out, and where all is unknown the loss is 0.
        gamma: focusing; the paper does not state its own, 2 is Lin's.
    """
    entropy = functional.cross_entropy(logits.float(), codes, ignore_index=IGNORE, reduction="none")
    weight = (1.0 - torch.exp(-entropy)) ** gamma
    known = codes != IGNORE
    return (weight * entropy).sum() / known.sum().clamp(min=1)


def entropy_and_dice(logits: Tensor, codes: Tensor, borders: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and one minus the mean soft Dice of the organs that are present, 0 where none is.

    Shapes and unknown voxels as in `focal`. Background has no term of Dice; an absent organ has none either:
    cross-entropy alone keeps it away.

    With `borders` the mean cross-entropy of the voxels `at_borders`, times `borders`, is added to that of all. They are
    few, so that in the mean of all they hardly count, and Dice asks of them no more than the class.

    It is one pass over the voxels, and one back. A few are taken at a time, so that what lies between logits and sums
    stays in a processor's cache: on one core that is three times as fast as the same sums over whole arrays.
    """
    known = codes != IGNORE
    weights = known / known.sum().clamp(min=1)
    if borders:
        beside = at_borders(codes)
        weights += beside * (borders / beside.sum().clamp(min=1))
    entropy, overlap = _EntropyAndDice.apply(logits, codes, weights)  # type: ignore[no-untyped-call]
    return entropy, overlap


class _EntropyAndDice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.arange(logits.shape[1], device=logits.device)[:, None]
        probabilities = torch.empty(logits.shape, device=logits.device).flatten(2)
        entropy = torch.zeros((), device=logits.device)
        shared, total, target = torch.zeros((3, len(classes)), device=logits.device)
        for known_p, some, marks, each in _parts(
            probabilities, logits.flatten(2), codes.flatten(1)[:, None], weights.flatten(1)[:, None]
        ):
            log_p = torch.log_softmax(some.float(), 0)
            # An unknown voxel is of no class.
            true = (marks == classes).float()
            entropy -= torch.dot((true * each).flatten(), log_p.flatten())
            torch.exp(log_p, out=known_p)
            known_p *= marks != IGNORE
            shared += (true * known_p).sum(1)
            total += known_p.sum(1)
            target += true.sum(1)
        present = target > 0
        present[0] = False
        share = present / present.sum().clamp(min=1)
        score = (2 * shared + 1.0) / (total + target + 1.0)
        ctx.save_for_backward(probabilities, codes, weights, share * 2 / (total + target + 1.0), score)
        ctx.logits = logits.dtype
        return entropy, (share * (1.0 - score)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_entropy: Tensor, of_dice: Tensor) -> tuple[Tensor, None, None]:
        probabilities, codes, weights, of_class, score = ctx.saved_tensors
        classes = torch.arange(len(score), device=score.device)[:, None]
        of_true, of_sum = (of_class * of_dice)[:, None], (of_class * score / 2 * of_dice)[:, None]
        result = torch.empty(probabilities.shape, dtype=ctx.logits, device=score.device)
        for slope, p, marks, each in _parts(
            result, probabilities, codes.flatten(1)[:, None], (weights * of_entropy).flatten(1)[:, None]
        ):
            true = (marks == classes).float()
            # By each probability; then through the softmax.
            by_p = of_sum - true * of_true
            by_p += each - (p * by_p).sum(0)
            slope.copy_(by_p.mul_(p).sub_(true.mul_(each)))
        return result.view(len(codes), -1, *codes.shape[1:]), None, None


def _parts(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few voxels of each array (N, C, voxels), sample by sample, as views (C, voxels)."""
    few = VOXELS_AT_ONCE if arrays[0].device.type == "cpu" else arrays[0].shape[-1]
    for sample in zip(*arrays, strict=True):
        yield from zip(*(array.split(few, -1) for array in sample), strict=True)


def at_borders(codes: Tensor) -> Tensor:
    """Which voxels (N, D, H, W) share a face with one of another class; the unknown neither are such nor count."""
    found = torch.zeros_like(codes, dtype=torch.bool)
    small = codes.to(torch.uint8)
    for axis in range(1, codes.ndim):
        length = codes.shape[axis] - 1
        first, second = (small.narrow(axis, start, length) for start in (0, 1))
        differ = (first != second) & (first != IGNORE) & (second != IGNORE)
        for start in (0, 1):
            found.narrow(axis, start, length).logical_or_(differ)
    return found


def foreground_loss(logit: Tensor, share: Tensor) -> Tensor:
    """Binary cross-entropy plus one minus soft Dice, for the ROI net.

    Args:
        logit: (N, 1, D, H, W).
        share: of foreground in each voxel, 0 to 1, the same shape; all 0 in a view without organs.
    """
    logit = logit.float()
    entropy = functional.binary_cross_entropy_with_logits(logit, share)
    probability = torch.sigmoid(logit)
    overlap = (2 * (probability * share).sum() + 100.0) / (probability.sum() + share.sum() + 100.0)
    return entropy + 1.0 - overlap
