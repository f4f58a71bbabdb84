"""A short run of the fuzzer, the files that it has found so far, and whether it would find anything at all."""

import gzip
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastorgan import volume
from fastorgan.cascade import Cascade
from tests.fuzz_volumes import fake_cascade, fuzz, make_case, run_case

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.packed"))
"""Gzipped, so that they are small; each once ended in a traceback, a word of NumPy's, or minutes of work."""

SEED = int(os.environ.get("FASTORGAN_FUZZ_SEED", "14"))


@pytest.fixture(scope="module")
def known() -> Iterator[Cascade]:
    with fake_cascade() as cascade:
        yield cascade


@pytest.mark.parametrize("packed", CORPUS, ids=[path.name.removesuffix(".packed") for path in CORPUS])
def test_files_that_were_found_are_handled(tmp_path: Path, packed: Path, known: Cascade) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / packed.name.removesuffix(".packed")
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    begun = time.process_time()
    assert run_case(path, tmp_path / "out" / "case.nii.gz", known) == []
    assert time.process_time() - begun < 5


def test_there_is_a_corpus() -> None:
    assert len(CORPUS) >= 6


def test_cases_are_the_same_each_time(tmp_path: Path) -> None:
    for number in range(30):
        made = []
        for folder in (tmp_path / f"{number}a", tmp_path / f"{number}b"):
            folder.mkdir()
            path = make_case(1, number, folder)
            made.append((path.name, path.read_bytes()))
        assert made[0] == made[1]


def test_a_few_hundred_spoilt_files() -> None:
    outcome = fuzz(SEED, 250)
    assert outcome.findings == []
    assert sum(outcome.cases.values()) == 250
    # Neither are all refused nor all taken.
    assert 20 < sum(outcome.labelled.values()) < 230


@pytest.mark.slow
def test_thousands_of_spoilt_files() -> None:
    outcome = fuzz(SEED + 1, 3000)
    assert outcome.findings == []
    assert outcome.slowest < 10


def test_a_traceback_would_be_found(tmp_path: Path, known: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(volume, "find_rescale", careless)
    (tmp_path / "out").mkdir()
    packed = next(path for path in CORPUS if path.name.startswith("voxel-beyond-float"))
    path = tmp_path / "case.nii"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    wrong = run_case(path, tmp_path / "out" / "case.nii.gz", known)
    assert any("ZeroDivisionError" in line for line in wrong)
