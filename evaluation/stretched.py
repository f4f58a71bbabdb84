"""A scan of any number of slices, made from a real one by repetition along z, for timings."""

from pathlib import Path

import nibabel as nib
import numpy as np

from fastorgan.volume import load_image, read_volume, save_image

NOISE_HU = 4.0
"""Standard deviation of what is added to each slice, so that no two are the same and gzip finds no repeats."""


def stretch(source: Path, target: Path, slices: int, noise: float = NOISE_HU, seed: int = 0) -> None:
    """Write a CT with `slices` slices that spans the same body as `source`: slices are repeated or left out evenly.

    Args:
        source: a CT of integers whose third axis is the one to repeat along.
        target: int16, the source's header but for the third axis' spacing.
        slices: how many.
        noise: in HU, normal, rounded to stored values.
        seed: of the noise.

    Raises:
        VolumeError: if `source` is no CT volume, or `target` cannot be written.
    """
    image = load_image(source)
    read_volume(image, str(source))
    stored = np.asanyarray(image.dataobj.get_unscaled())  # type: ignore[attr-defined]
    stored = stored.reshape(stored.shape[:3])
    before = stored.shape[2]
    draw = np.random.default_rng(seed)
    out = np.empty((*stored.shape[:2], slices), np.int16, order="F")
    limits = np.iinfo(np.int16)
    for k in range(slices):
        added = np.rint(draw.normal(0.0, noise, stored.shape[:2]))
        out[:, :, k] = np.clip(stored[:, :, (2 * k + 1) * before // (2 * slices)] + added, limits.min, limits.max)
    affine = image.affine.copy()
    step = before / slices
    # Edges stay where they were, so the first centre moves by half the change of a voxel.
    affine[:3, 3] += affine[:3, 2] * (step - 1.0) / 2.0
    affine[:3, 2] *= step
    made = nib.Nifti1Image(out, affine, image.header)
    made.header.set_data_dtype(np.int16)
    made.header.set_slope_inter(image.dataobj.slope, image.dataobj.inter)  # type: ignore[attr-defined]
    save_image(made, target)
