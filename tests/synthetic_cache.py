"""A small patient for the tests of training: four ellipsoid organs, each of its own grey value, in a grey body."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastorgan.box import extent_mm
from training.cache import CachedVolume

BODY = 90
LEVELS = {0: BODY, 1: 140, 2: 170, 3: 200, 4: 230}
"""Eight-bit grey value by organ code."""

# By code: centre and half axes (z, y, x) as shares of the scan; x goes to the patient's right, where the liver is.
ELLIPSOIDS = {
    1: ((0.60, 0.55, 0.72), (0.25, 0.30, 0.20)),
    2: ((0.30, 0.30, 0.35), (0.15, 0.15, 0.10)),
    3: ((0.62, 0.40, 0.18), (0.18, 0.18, 0.10)),
    4: ((0.45, 0.60, 0.40), (0.10, 0.12, 0.14)),
}


def anatomy(shape: Sequence[int]) -> NDArray[np.uint8]:
    """Organ codes on a grid of `shape` (z, y, x)."""
    places = np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")
    codes = np.zeros(shape, np.uint8)
    for code, (centre, half) in ELLIPSOIDS.items():
        distance = sum(((p - c) / h) ** 2 for p, c, h in zip(places, centre, half, strict=True))
        codes[distance < 1] = code
    return codes


def grey(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The grey values of `LEVELS`."""
    table = np.full(256, BODY, np.uint8)
    for code, level in LEVELS.items():
        table[code] = level
    return table[codes]


def cached(
    codes: NDArray[np.uint8],
    spacing: Sequence[float],
    *,
    image: NDArray[np.uint8] | None = None,
    name: str = "a",
    patient: str | None = None,
) -> CachedVolume:
    """A cached volume of the organ net that holds its whole scan."""
    voxel = tuple(float(s) for s in spacing)
    organs = np.stack(extent_mm((codes > 0) & (codes < 255), voxel))
    sizes = np.asarray(voxel)
    grey_values = grey(codes) if image is None else image
    return CachedVolume(
        name, patient or name, grey_values, codes, sizes, np.zeros(3), np.array(codes.shape) * sizes, organs
    )


def as_roi(volume: CachedVolume) -> CachedVolume:
    """The same volume for the ROI net: the foreground's share in place of codes."""
    share = np.where((volume.labels > 0) & (volume.labels < 255), 255, 0).astype(np.uint8)
    return CachedVolume(**{**volume.__dict__, "labels": share})


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch, where it is installed, compute in one thread: these inputs are too small to be shared out."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_cache(folder: Path, patients: Sequence[str] = ("p0", "p1", "p2")) -> Path:
    """A cache of one small noisy volume for each patient, for both networks; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, patient in enumerate(patients):
        codes = anatomy((24, 30, 44))
        noise = np.random.default_rng(number).integers(-8, 9, codes.shape)
        image = (grey(codes) + noise).astype(np.uint8)
        volume = cached(codes, (8.0, 7.5, 7.5), image=image, name=f"case{number}", patient=patient)
        volume.save(folder / f"{volume.name}.organs.npz")
        as_roi(volume).save(folder / f"{volume.name}.roi.npz")
    return folder
