"""Pockets of gas in the bowel, and what may be there in its stead.

Bowel full of contrast agent lies beside spleen and kidneys and is as bright; where few of the scans that are trained on
show any, a network takes it for them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastorgan.components import label
from fastorgan.intensity import level_of, to_unit

from .cache import CachedVolume

GAS_HU = -175.0
"""What is below is gas: little above the lower end of the window, so that fat is not."""

POCKET_ML = (0.3, 300.0)
"""Least and greatest volume of a pocket; what is smaller is noise, what is larger may be a lung."""

MOST_POCKETS = 250

BRIGHT = 0.8
"""Chance of contrast agent; water or stool else."""

BRIGHT_HU, DULL_HU = (120.0, 500.0), (-10.0, 90.0)
SPREAD_HU = 40.0
"""Standard deviation between the pockets of a sample."""

FILLED = 0.75
"""Share of the pockets of a sample."""

WALL_HU = 40.0


def gas_pockets(volume: CachedVolume) -> NDArray[np.uint8]:
    """Number the pockets of gas in a scan, the largest first; 0 elsewhere, and in lungs and outside air.

    Those reach the cached array's faces, or are larger than `POCKET_ML`.
    """
    pieces, voxels = label(volume.image <= level_of(GAS_HU))
    ml = voxels * np.prod(volume.spacing) / 1000.0
    inner = (ml >= POCKET_ML[0]) & (ml <= POCKET_ML[1])
    for axis in range(3):
        for end in (0, -1):
            inner[np.unique(pieces.take(end, axis))] = False
    inner[0] = False
    order = np.argsort(-ml * inner)[: min(int(inner.sum()), MOST_POCKETS)]
    numbers = np.zeros(len(ml), np.uint8)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers[pieces]


def fill(unit: Tensor, pockets: Tensor, random: np.random.Generator) -> Tensor:
    """Fill pockets of gas with contrast agent, water or stool.

    Args:
        unit: (1, 1, D, H, W) in [0, 1].
        pockets: (1, D, H, W) int64, numbers of `gas_pockets`.
        random: the source of chance.

    Returns:
        A new tensor like `unit`. Where a voxel is part gas and part wall, the gas alone changes.
    """
    device = unit.device
    hu = random.uniform(*(BRIGHT_HU if random.random() < BRIGHT else DULL_HU))
    count = MOST_POCKETS + 1
    levels = torch.from_numpy(to_unit(random.normal(hu, SPREAD_HU, count))).to(device)
    filled = torch.from_numpy(random.random(count) < FILLED).to(device)
    filled[0] = False
    # A pocket's rim is part gas as well, or a dark line would tell of what was there.
    pockets = torch.nn.functional.max_pool3d(pockets[:, None].float(), 3, 1, 1)[:, 0].long()
    level = levels[pockets][:, None]
    if random.random() < 0.4:
        coarse = [max(2, side // 3) for side in unit.shape[2:]]
        lumps = torch.randn((1, 1, *coarse), device=device) * float(random.uniform(0, 0.2))
        level = level + torch.nn.functional.interpolate(lumps, size=unit.shape[2:], mode="trilinear")
    wall = float(to_unit(np.array([WALL_HU]))[0])
    share = ((wall - unit) / wall).clamp(0, 1) * filled[pockets][:, None]
    return torch.lerp(unit, level.clamp(0, 1), share)
