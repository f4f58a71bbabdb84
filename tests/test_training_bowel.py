from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch")

import torch

from fastorgan.intensity import LEVELS, to_unit
from tests.synthetic_cache import BODY, anatomy, cached, one_thread
from training.bowel import GAS_HU, MOST_POCKETS, POCKET_ML, fill, gas_pockets
from training.recipes import Augmentation
from training.sampling import OrganSampler, Scan

SHAPE = (24, 30, 44)
SPACING = (8.0, 7.5, 7.5)
"""A voxel has 0.45 ml."""


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def level(hu: float) -> int:
    """The eight-bit grey value of an HU."""
    return int(np.rint(to_unit(np.array([hu]))[0] * LEVELS))


def body() -> NDArray[np.uint8]:
    return np.full(SHAPE, BODY, np.uint8)


def pockets_of(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return gas_pockets(cached(anatomy(SHAPE), SPACING, image=image))


def test_pockets_are_numbered_from_the_largest() -> None:
    image = body()
    image[5:7, 5:7, 5:7] = 0
    image[12:16, 12:16, 12:16] = 0
    image[20, 20, 20] = 0
    expected = np.zeros(SHAPE, np.uint8)
    expected[12:16, 12:16, 12:16] = 1
    expected[5:7, 5:7, 5:7] = 2
    expected[20, 20, 20] = 3
    assert np.array_equal(pockets_of(image), expected)


def test_lungs_and_outside_air_are_none() -> None:
    image = body()
    image[:, :2] = 0
    image[20:, 10:20, 10:20] = 0
    image[5:8, 10:13, -1] = 0
    # 672 voxels have 302 ml.
    image[3:10, 8:16, 15:27] = 0
    assert POCKET_ML[1] < 7 * 8 * 12 * 0.45
    assert not pockets_of(image).any()


def test_noise_and_fat_are_none() -> None:
    fine = np.full((24, 30, 44), BODY, np.uint8)
    fine[10, 10, 10] = 0
    assert not gas_pockets(cached(anatomy(SHAPE), (2.5, 1.5, 1.5), image=fine)).any()
    fat = body()
    fat[5:9, 5:9, 5:9] = level(-110)
    assert not pockets_of(fat).any()
    gas = body()
    gas[5:9, 5:9, 5:9] = level(GAS_HU - 5)
    assert pockets_of(gas).any()


def test_of_too_many_pockets_the_largest_are_kept() -> None:
    image = np.full((24, 60, 88), BODY, np.uint8)
    image[1:-1:2, 1:-1:3, 1:-1:3] = 0
    image[10, 10:12, 10] = 0
    numbers = gas_pockets(cached(anatomy((24, 60, 88)), SPACING, image=image))
    assert numbers.max() == MOST_POCKETS
    assert len(np.unique(numbers)) == MOST_POCKETS + 1
    assert (numbers == 1).sum() > 1


def gassy(size: tuple[int, int, int] = (12, 12, 12)) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft tissue of 40 HU with a pocket of gas, its rim half gas, and the pocket's number."""
    soft = float(to_unit(np.array([40.0]))[0])
    unit = torch.full((1, 1, *size), soft)
    unit[..., 3:9, 3:9, 3:9] = soft / 2
    unit[..., 4:8, 4:8, 4:8] = 0.0
    pockets = torch.zeros((1, *size), dtype=torch.int64)
    pockets[:, 4:8, 4:8, 4:8] = 1
    return unit, pockets


def test_gas_is_filled_and_nothing_else_changes() -> None:
    unit, pockets = gassy()
    levels = []
    for seed in range(40):
        filled = fill(unit, pockets, np.random.default_rng(seed))
        assert filled.min() >= 0
        assert filled.max() <= 1
        outside = torch.ones_like(unit, dtype=torch.bool)
        outside[..., 3:9, 3:9, 3:9] = False
        assert torch.equal(filled[outside], unit[outside])
        inner = filled[..., 4:8, 4:8, 4:8]
        if inner.max() > 0:
            # Half gas before, half filled now.
            rim = filled[0, 0, 3, 6, 6]
            assert float(rim) == pytest.approx(float(unit[0, 0, 3, 6, 6] + inner.mean()) / 2, abs=0.16)
            levels.append(float(inner.mean()))
    # A quarter of the pockets stay as they are; contrast agent is bright, water is not.
    assert 20 <= len(levels) <= 40
    assert max(levels) > float(to_unit(np.array([250.0]))[0])
    assert min(levels) < float(to_unit(np.array([100.0]))[0])


def test_without_gas_nothing_is_filled() -> None:
    unit, pockets = gassy()
    assert torch.equal(fill(unit, torch.zeros_like(pockets), np.random.default_rng(0)), unit)


def test_samples_have_their_gas_filled() -> None:
    image = body()
    image[12:16, 12:16, 20:26] = 0
    scan = Scan.to_device(cached(anatomy(SHAPE), SPACING, image=image), torch.device("cpu"))
    quiet = dict.fromkeys(Augmentation.__dataclass_fields__, 0.0)
    plain, codes = OrganSampler((24, 32, 48), None, np.random.default_rng(0)).draw(scan)
    sampler = OrganSampler((24, 32, 48), Augmentation(**{**quiet, "filled": 1.0}), np.random.default_rng(0))
    gas = plain < -0.9
    assert 0.001 < gas.float().mean() < 0.05
    near = torch.nn.functional.max_pool3d(gas.float(), 5, 1, 2) > 0
    emptied = 0
    for _ in range(10):
        filled, same = sampler.draw(scan)
        assert torch.equal(codes, same)
        # What is changed is gas or its rim; gas is changed in most samples.
        assert torch.equal(filled[~near], plain[~near])
        emptied += bool((filled[gas] > -0.9).all())
    assert 4 <= emptied <= 9
