"""The paper's augmentation: rotation, scaling and Gaussian noise, through batchgenerators.

He & Luo name the three kinds and the framework's library but no amplitudes; those here are nnU-Net's, whose habits
the paper follows: 30 degrees about z, 0.7 to 1.4 in scale, each in a fifth of the samples, noise variance to 0.1 in a
tenth.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastorgan.box import Box, frame
from fastorgan.intensity import LEVELS, to_network
from fastorgan.labels import IGNORE
from fastorgan.resample import axis_weights

from .cache import CachedVolume
from .sampling import Scan

TURN = np.radians(30.0)
SCALE = (0.7, 1.4)
CHANCE = 0.2
NOISE_VARIANCE = (0.0, 0.1)
NOISE_CHANCE = 0.1


class PaperSampler:
    """Samples as `sampling.OrganSampler` draws them, augmented on the CPU by batchgenerators.

    The box is the labels' own. batchgenerators draws from numpy's global generator, which every draw seeds anew from
    `generator`: the state of that one decides all samples to come, so that a resumed run goes on as it would have.
    """

    def __init__(self, size: tuple[int, int, int], generator: np.random.Generator):
        from batchgenerators.transforms.abstract_transforms import Compose
        from batchgenerators.transforms.noise_transforms import GaussianNoiseTransform
        from batchgenerators.transforms.spatial_transforms import SpatialTransform

        self.size = size
        self.random = generator
        # batchgenerators calls the first array axis x: that is z here.
        self.transform = Compose(
            [
                SpatialTransform(
                    size,
                    do_elastic_deform=False,
                    angle_x=(-TURN, TURN),
                    angle_y=(0.0, 0.0),
                    angle_z=(0.0, 0.0),
                    scale=SCALE,
                    border_mode_data="nearest",
                    border_cval_seg=IGNORE,
                    order_data=1,
                    order_seg=0,
                    random_crop=False,
                    p_rot_per_sample=CHANCE,
                    p_scale_per_sample=CHANCE,
                ),
                GaussianNoiseTransform(NOISE_VARIANCE, p_per_sample=NOISE_CHANCE),
            ]
        )

    def draw(self, scan: Scan) -> tuple[Tensor, Tensor]:
        """One sample of `scan`: image (1, 1, *size) in the networks' range, codes of the cache (1, *size) int64."""
        image, codes = boxed(scan.source, self.size)
        np.random.seed(int(self.random.integers(2**31)))  # noqa: NPY002  batchgenerators knows no other
        batch = self.transform(data=to_network(image)[None, None], seg=codes[None, None].astype(np.float32))
        device = scan.image.device
        labels = torch.from_numpy(np.rint(batch["seg"][:, 0]).astype(np.int64))
        return torch.from_numpy(batch["data"].astype(np.float32)).to(device), labels.to(device)


def boxed(source: CachedVolume, size: tuple[int, int, int]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The labels' own box at `size`: values in [0, 1], and the nearest codes."""
    start, stop = source.organs_mm
    shape = tuple(np.rint(source.scan_mm / source.spacing).astype(int))
    box: Box = frame(start, stop, Box.whole(shape), tuple(source.spacing))
    image = source.image.astype(np.float32) / LEVELS
    codes = source.labels
    offset = source.origin_mm / source.spacing
    for axis in range(3):
        first, last = box.start[axis] - offset[axis], box.stop[axis] - offset[axis]
        length = image.shape[axis]
        weights = axis_weights(length, first, last, size[axis])
        image = np.moveaxis(np.moveaxis(image, axis, -1) @ weights.T, -1, axis)
        nearest = np.floor(first + (np.arange(size[axis]) + 0.5) * (last - first) / size[axis]).astype(int)
        codes = np.take(codes, np.clip(nearest, 0, length - 1), axis=axis)
    return np.ascontiguousarray(image), codes
