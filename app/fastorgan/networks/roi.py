"""The ROI net that finds the abdomen in the whole CT at 96x96x96."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import ConvUnit, initialise, upsample

PAPER_WIDTHS = (16, 32, 64, 128)


class RoiUNet(nn.Module):
    """The U-Net of the paper's figure: two convolutions a level, three concatenating skips.

    Maps (N, 1, 96, 96, 96) to one foreground logit per voxel, the same size; sides are multiples of
    2 ** (levels - 1). Levels are left by max pooling and entered by a 1x1x1 convolution and linear enlargement.

    Args:
        widths: channels per level, finest first; the figure's are `PAPER_WIDTHS`.
    """

    def __init__(self, widths: Sequence[int] = PAPER_WIDTHS) -> None:
        super().__init__()
        levels = [1, *widths]
        self.pool = nn.MaxPool3d(2)
        self.encoders = nn.ModuleList(
            nn.Sequential(ConvUnit(levels[i], levels[i + 1]), ConvUnit(levels[i + 1], levels[i + 1]))
            for i in range(len(widths))
        )
        upward = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.reduces = nn.ModuleList(ConvUnit(below, here, kernel=1) for below, here in upward)
        self.decoders = nn.ModuleList(
            nn.Sequential(ConvUnit(2 * here, here), ConvUnit(here, here)) for _, here in upward
        )
        self.out = nn.Conv3d(widths[0], 1, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the foreground logit; see the class for shapes."""
        skips: list[Tensor] = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for reduce, decoder in zip(self.reduces, self.decoders, strict=True):
            x = decoder(torch.cat((skips.pop(), upsample(reduce(x))), dim=1))
        logit: Tensor = self.out(x)
        return logit


class SlimRoiUNet(nn.Module):
    """The ROI net that ships: 254,382 parameters, 3,291,217,920 multiply-accumulates at 96x96x96.

    A strided stem, widths 16-32-64, added skips, and a small refinement of the half-resolution logit at full size.
    Maps (N, 1, D, H, W) to one foreground logit per voxel, the same size; sides are multiples of 8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvUnit(1, 16, kernel=5, stride=2)
        self.encode1 = ConvUnit(16, 16)
        self.down1 = ConvUnit(16, 32, stride=2)
        self.encode2 = ConvUnit(32, 32)
        self.down2 = ConvUnit(32, 64, stride=2)
        self.encode3 = ConvUnit(64, 64)
        self.reduce2 = ConvUnit(64, 32, kernel=1)
        self.decode2 = ConvUnit(32, 32)
        self.reduce1 = ConvUnit(32, 16, kernel=1)
        self.decode1 = ConvUnit(16, 16)
        self.coarse = nn.Conv3d(16, 1, 1)
        self.refine = nn.Sequential(ConvUnit(2, 4), nn.Conv3d(4, 1, 3, padding=1))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the foreground logit; see the class for shapes."""
        fine = self.encode1(self.stem(x))
        middle = self.encode2(self.down1(fine))
        deep = self.encode3(self.down2(middle))
        middle = self.decode2(middle + upsample(self.reduce2(deep)))
        fine = self.decode1(fine + upsample(self.reduce1(middle)))
        coarse = upsample(self.coarse(fine))
        logit: Tensor = coarse + self.refine(torch.cat((x.to(coarse.dtype), coarse), dim=1))
        return logit
