"""Further organs that the organ net learns beside its own: a second head in training, dropped when weights leave a run.

Knowing the stomach, the duodenum and the vessels helps to tell the pancreas from them, and costs inference nothing.
"""

import torch
from torch import Tensor, nn

from fastorgan.labels import CLASSES, IGNORE
from fastorgan.networks import DenseVNet
from fastorgan.networks.guided import guided_upsample
from fastorgan.resample import axis_weights

from .cache import STRUCTURES
from .losses import entropy_and_dice


class TwoHeads(nn.Module):
    """The organ net with a head for the structures: background and one channel each, at half the input's size.

    Args:
        network: whose features both heads see, and whose weights are the ones that are exported.
    """

    def __init__(self, network: DenseVNet) -> None:
        super().__init__()
        self.network = network
        organs = network.classify
        self.head = nn.Conv3d(organs.in_channels, 1 + len(STRUCTURES), 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the organs (N, 5, D, H, W) and of the structures (N, 9, D/2, H/2, W/2)."""
        organs, structures = self.network.classify, self.head
        # One convolution, since another would go through the features once more, and twice more on the way back.
        assert organs.bias is not None
        assert structures.bias is not None
        weight, bias = torch.cat((organs.weight, structures.weight)), torch.cat((organs.bias, structures.bias))
        both = nn.functional.conv3d(self.network.features(x), weight, bias, padding=1)
        logits, further = both[:, : organs.out_channels], both[:, organs.out_channels :]
        return guided_upsample(logits, x, enlarge) if self.network.guided else enlarge(logits), further


def enlarge(logits: Tensor) -> Tensor:
    """What `fastorgan.networks.blocks.upsample` computes, contiguous, by a matrix product along each axis.

    On a CPU with bf16 it takes a fifth of the time, there and back; in float32 a half.
    """
    flat = logits.contiguous().flatten(0, 1)
    depth, height, width = (torch.from_numpy(axis_weights(n, 0, n, 2 * n)).to(logits.device) for n in flat.shape[1:])
    wide = (flat @ width.T).flatten(0, 1)
    tall = (height @ wide).view(*flat.shape[:2], -1)
    return (depth @ tall).view(*logits.shape[:2], *(2 * n for n in flat.shape[1:]))


def split_codes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Part codes of organs and structures: (organs, structures), each with the other as background.

    Structures are counted from 1 on; unknown voxels are unknown in both.
    """
    unknown = codes == IGNORE
    further = (codes >= CLASSES) & ~unknown
    structures = torch.where(further, codes - CLASSES + 1, torch.where(unknown, codes, 0))
    return torch.where(further, 0, codes), structures


def structures_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy plus one minus soft Dice of the structures; 0 where a sample shows none.

    Such a sample may come from a scan in which nobody has marked any.

    Args:
        logits: (N, 9, D/2, H/2, W/2).
        codes: (N, D, H, W), as `split_codes` gives them.
    """
    # A quarter of a voxel of the smaller grid off: less than the labels are.
    codes = codes[:, ::2, ::2, ::2].contiguous()
    if not bool(((codes > 0) & (codes != IGNORE)).any()):
        return logits.sum() * 0.0
    entropy, overlap = entropy_and_dice(logits, codes)
    return entropy + overlap
