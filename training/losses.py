"""Losses over logits, with unknown voxels left out."""

import torch
from torch import Tensor
from torch.nn import functional

from fastorgan.labels import IGNORE


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


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy; shapes and unknown voxels as in `focal`."""
    entropy = functional.cross_entropy(logits.float(), codes, ignore_index=IGNORE, reduction="sum")
    return entropy / (codes != IGNORE).sum().clamp(min=1)


def dice(logits: Tensor, codes: Tensor) -> Tensor:
    """One minus the mean soft Dice of the organs that are present; 0 where none is.

    Shapes as in `focal`. Background has no term; an absent organ has none either: cross-entropy alone keeps it away.
    """
    known = (codes != IGNORE)[:, None]
    probabilities = torch.softmax(logits.float(), dim=1) * known
    target = functional.one_hot(torch.where(codes == IGNORE, 0, codes), logits.shape[1])
    target = torch.movedim(target, -1, 1).to(probabilities.dtype) * known
    axes = (0, 2, 3, 4)
    shared = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    present = target.sum(axes)[1:] > 0
    score = ((2 * shared + 1.0) / (total + 1.0))[1:]
    return 1.0 - score[present].mean() if bool(present.any()) else score.sum() * 0.0


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
