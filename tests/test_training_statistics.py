from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from fastorgan.box import ROI_SIZE
from tests.synthetic_cache import one_thread
from training.cache import load_cache
from training.cases import DataError
from training.recipes import GENTLE
from training.sampling import OrganSampler, Scan
from training.statistics import DRAWS, measure_statistics

SIZE = (24, 32, 40)


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def norm() -> nn.BatchNorm3d:
    """A network that is a batch norm alone, with statistics of nothing that it will see."""
    module = nn.BatchNorm3d(1).eval()
    module.running_mean = torch.tensor([7.0])
    module.running_var = torch.tensor([11.0])
    return module


def seen(cache: Path, patients: str) -> list[torch.Tensor]:
    """The samples of some patients' scans, each scan as often as the others."""
    torch.manual_seed(0)
    sampler = OrganSampler(SIZE, GENTLE, np.random.default_rng(0))
    volumes = [volume for volume in load_cache(cache, "organs") if volume.patient[1] in patients]
    return [sampler.draw(Scan.to_device(volume, torch.device("cpu")))[0] for _ in range(DRAWS) for volume in volumes]


def test_statistics_are_the_mean_over_the_scans(cache: Path) -> None:
    module = norm()
    measure_statistics(module, "organs", SIZE, cache)
    samples = seen(cache, "012")
    assert len(samples) == 3 * DRAWS
    assert module.running_mean is not None
    assert module.running_var is not None
    # What a network of half precision sees differs in the third digit.
    assert float(module.running_mean) == pytest.approx(np.mean([float(s.mean()) for s in samples]), abs=2e-3)
    assert float(module.running_var) == pytest.approx(np.mean([float(s.var()) for s in samples]), rel=5e-3)


def test_patients_left_out_are_not_looked_at(cache: Path) -> None:
    module, alone = norm(), norm()
    measure_statistics(module, "organs", SIZE, cache, {"p0", "p2"})
    alone.train().momentum = None
    alone.reset_running_stats()
    for sample in seen(cache, "1"):
        alone(sample)
    assert module.running_mean is not None
    assert alone.running_mean is not None
    assert float(module.running_mean) == pytest.approx(float(alone.running_mean), abs=2e-3)
    everyone = norm()
    measure_statistics(everyone, "organs", SIZE, cache)
    assert everyone.running_mean is not None
    assert not torch.equal(everyone.running_mean, module.running_mean)


def test_nothing_else_changes(cache: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2, momentum=0.3), nn.Dropout(0.5)).eval()
    before = {name: value.clone() for name, value in module.named_parameters()}
    measure_statistics(module, "organs", SIZE, cache)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
    assert not any(part.training for part in module.modules())
    assert module[1].momentum == 0.3


def test_the_same_scans_have_the_same_statistics_and_take_no_chance_from_others(cache: Path) -> None:
    first, second = norm(), norm()
    measure_statistics(first, "organs", SIZE, cache)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    measure_statistics(second, "organs", SIZE, cache)
    assert torch.equal(torch.rand(1), expected)
    assert first.running_mean is not None
    assert second.running_mean is not None
    assert torch.equal(first.running_mean, second.running_mean)


def test_the_roi_nets_are_of_its_own_samples(cache: Path) -> None:
    sizes = set()
    module = norm()
    module.register_forward_hook(lambda _, given, __: sizes.add(tuple(given[0].shape)))
    measure_statistics(module, "roi", SIZE, cache)
    assert sizes == {(1, 1, *ROI_SIZE)}


def test_without_a_patient_there_are_none(cache: Path) -> None:
    with pytest.raises(DataError, match=f"{cache}: every patient is left out; there is nothing to measure"):
        measure_statistics(norm(), "organs", SIZE, cache, {"p0", "p1", "p2"})
