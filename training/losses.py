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


def entropy_and_dice(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and one minus the mean soft Dice of the organs that are present, 0 where none is.

    Shapes and unknown voxels as in `focal`. Background has no term of Dice; an absent organ has none either:
    cross-entropy alone keeps it away.

    It is one pass over the voxels, and one back. A few are taken at a time, so that what lies between logits and sums
    stays in a processor's cache: on one core that is three times as fast as the same sums over whole arrays.
    """
    entropy, overlap = _EntropyAndDice.apply(logits, codes)  # type: ignore[no-untyped-call]
    return entropy, overlap


class _EntropyAndDice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.arange(logits.shape[1], device=logits.device)[:, None]
        probabilities = torch.empty(logits.shape, device=logits.device).flatten(2)
        entropy = torch.zeros((), device=logits.device)
        shared, total, target = torch.zeros((3, len(classes)), device=logits.device)
        for known_p, some, marks in _parts(probabilities, logits.flatten(2), codes.flatten(1)[:, None]):
            log_p = torch.log_softmax(some.float(), 0)
            # An unknown voxel is of no class.
            true = (marks == classes).float()
            entropy -= torch.dot(true.flatten(), log_p.flatten())
            torch.exp(log_p, out=known_p)
            known_p *= marks != IGNORE
            shared += (true * known_p).sum(1)
            total += known_p.sum(1)
            target += true.sum(1)
        known = target.sum().clamp(min=1)
        present = target > 0
        present[0] = False
        share = present / present.sum().clamp(min=1)
        score = (2 * shared + 1.0) / (total + target + 1.0)
        ctx.save_for_backward(probabilities, codes, known, share * 2 / (total + target + 1.0), score)
        ctx.logits = logits.dtype
        return entropy / known, (share * (1.0 - score)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_entropy: Tensor, of_dice: Tensor) -> tuple[Tensor, None]:
        probabilities, codes, known, weight, score = ctx.saved_tensors
        classes = torch.arange(len(score), device=score.device)[:, None]
        of_true, of_sum = (weight * of_dice)[:, None], (weight * score / 2 * of_dice)[:, None]
        of_entropy = of_entropy / known
        result = torch.empty(probabilities.shape, dtype=ctx.logits, device=score.device)
        for slope, p, marks in _parts(result, probabilities, codes.flatten(1)[:, None]):
            true = (marks == classes).float()
            # By each probability; then through the softmax.
            by_p = of_sum - true * of_true
            by_p += of_entropy - (p * by_p).sum(0)
            slope.copy_(by_p.mul_(p).sub_(true.mul_(of_entropy)))
        return result.view(len(codes), -1, *codes.shape[1:]), None


def _parts(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few voxels of each array (N, C, voxels), sample by sample, as views (C, voxels)."""
    few = VOXELS_AT_ONCE if arrays[0].device.type == "cpu" else arrays[0].shape[-1]
    for sample in zip(*arrays, strict=True):
        yield from zip(*(array.split(few, -1) for array in sample), strict=True)


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
