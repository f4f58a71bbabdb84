"""Where the borders of labelled organs lie between the voxels of a scan.

Slices are often thicker than the network's samples. Taken from the nearest voxel, an organ's border has steps of a
slice, whose place depends on the grid alone. Between signed distances it runs straight from one slice to the next
(shape-based interpolation, Raya and Udupa 1990, here with distances in three dimensions).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastorgan.labels import CLASSES, IGNORE, ORGANS

from .distances import around, beyond_border, signed_distance

UNIT_MM = 0.1
"""Distances are kept in eight bits, in this unit."""

MOST = 127

REACH_MM = MOST * UNIT_MM
"""What is farther from a border counts as this far."""


def nn_sample(array: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
    """`grid_sample` with voxel edges at -1 and 1."""
    return torch.nn.functional.grid_sample(array, grid, mode=mode, padding_mode=padding, align_corners=False)


@dataclass(frozen=True)
class Borders:
    """The borders of a scan's organs, on the device of its labels.

    Attributes:
        distances: (organ, z, y, x) int8, signed distances in `UNIT_MM`, cut off at `MOST`.
        near: (z, y, x) bool, whether a border may run between a voxel and its neighbours.
    """

    distances: Tensor
    near: Tensor

    @classmethod
    def of(cls, labels: NDArray[np.uint8], spacing: NDArray[np.float64], device: torch.device) -> "Borders":
        """Find the borders of `labels` (z, y, x), with voxels of `spacing` mm."""
        distances = np.full((len(ORGANS), *labels.shape), MOST, np.int8)
        for organ, result in zip(ORGANS, distances, strict=True):
            mask = labels == organ.code
            if mask.any():
                part = around(mask, REACH_MM, spacing)
                found = beyond_border(signed_distance(mask[part], spacing, REACH_MM), spacing)
                result[part] = np.rint(found / UNIT_MM)
        near = (np.abs(distances) <= np.linalg.norm(spacing) / UNIT_MM).any(axis=0)
        return cls(torch.from_numpy(distances).to(device), torch.from_numpy(near).to(device))

    def settle(self, codes: Tensor, grid: Tensor) -> Tensor:
        """Decide anew what lies beside borders: the organ whose border is farthest outwards, or none.

        Args:
            codes: (1, D, H, W) int64, of the voxels nearest to the places of `grid`; `IGNORE` stays.
            grid: (1, D, H, W, 3), as of torch's `grid_sample`.

        Returns:
            A new tensor like `codes`. What is no longer of an organ is background.
        """
        near = nn_sample(self.near[None, None].float(), grid, "nearest", "border")[:, 0].bool()
        places = grid[near][None, None, None]
        least, organ = nn_sample(self.distances[None].float(), places, "bilinear", "border")[0, :, 0, 0].min(0)
        old = codes[near]
        new = torch.where(least <= 0, organ + 1, torch.where(old < CLASSES, 0, old))
        result = codes.clone()
        result[near] = torch.where(old == IGNORE, IGNORE, new)
        return result
