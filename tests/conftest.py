"""A cascade whose networks know organs by their HU alone, and a CT made for it; and a training cache."""

from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from fastorgan import cascade, roi
from fastorgan.cascade import Cascade
from fastorgan.intensity import WINDOW_HU
from fastorgan.labels import CLASSES
from fastorgan.report import Engine
from fastorgan.runtime import Network
from fastorgan.weights import Weights
from tests.synthetic_cache import write_cache

# A busy machine is no reason to fail.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

BLOCKS_HU = {0: -50, 1: 50, 2: 120, 3: 190, 4: 260}
"""By code; the networks take each voxel for the nearest of these."""


class FakeRuntime:
    """Runs functions in the place of networks."""

    def __init__(self, roi: Network, organs: Network):
        self._networks = {"roi": roi, "organs": organs}
        self.faults: list[str] = []

    @property
    def engine(self) -> Engine:
        return Engine("fake", "1.0", "cpu", "test processor", "f32", 1)

    def load(self, weights: Weights, network: str) -> Network:
        return self._networks[network]


def to_hu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """A network's input in HU."""
    low, high = WINDOW_HU
    return (x + np.float32(1)) * np.float32((high - low) / 2) + np.float32(low)


def find_by_hu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Organs are what has more than 0 HU."""
    return to_hu(x)[None]


def label_by_hu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each class leads where the HU are nearest to its own."""
    hu = to_hu(x)
    return np.stack([-np.abs(hu - BLOCKS_HU[code]) for code in range(CLASSES)])


CascadeMaker = Callable[[Network, Network], Cascade]


@pytest.fixture(scope="module")
def make_cascade() -> Iterator[CascadeMaker]:
    """Makes a cascade of two functions; they see an eighth of the samples, so that tests are quick."""
    weights = Weights(
        Path("nowhere"), {"version": "0", "networks": {"roi": {"variant": "slim", "sha256": {"roi.xml": "ab"}}}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roi, "ROI_SIZE", (48, 48, 48))
        patch.setattr(cascade, "CROP_SIZE", (48, 64, 96))
        yield lambda roi, organs: Cascade(FakeRuntime(roi, organs), weights)


@pytest.fixture(scope="module")
def by_hu(make_cascade: CascadeMaker) -> Cascade:
    """A cascade that finds the organs of `blocks`."""
    return make_cascade(find_by_hu, label_by_hu)


@pytest.fixture
def blocks() -> tuple[nib.Nifti1Image, NDArray[np.uint8]]:
    """A CT of 300 x 250 x 200 mm in voxels of 5 mm (x, y, z), RAS+, with organs of plain blocks, and its labels."""
    codes = np.zeros((60, 50, 40), np.uint8)
    codes[36:54, 12:34, 14:32] = 1
    codes[6:14, 6:14, 8:20] = codes[40:48, 2:9, 6:17] = 2
    codes[6:18, 16:28, 18:32] = 3
    codes[22:32, 20:27, 16:22] = 4
    hu = np.array([BLOCKS_HU[code] for code in range(CLASSES)], np.int16)[codes]
    # A little air: without any, values are not taken for HU.
    hu[0, 0] = -1000
    return nib.Nifti1Image(hu, np.diag([5.0, 5.0, 5.0, 1.0])), codes


@pytest.fixture
def inputs(
    tmp_path: Path,
    blocks: tuple[nib.Nifti1Image, NDArray[np.uint8]],
    by_hu: Cascade,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder of one CT, and a command with the cascade that knows its organs."""
    monkeypatch.setattr(Cascade, "load", lambda *_, **__: by_hu)
    (tmp_path / "in").mkdir()
    nib.save(blocks[0], tmp_path / "in" / "ct_0000.nii.gz")
    return tmp_path / "in"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training cache of three patients, "p0" to "p2"; for reading only."""
    return write_cache(tmp_path_factory.mktemp("cache"))
