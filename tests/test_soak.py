import sys
from pathlib import Path

import nibabel as nib
import pytest

from evaluation.__main__ import main
from evaluation.soak import MOST_GROWTH, Growth, SoakError, soak
from fastorgan.phantom import make_phantom


def test_growth_is_counted_from_the_fifth_case() -> None:
    growth = Growth((100.0, 200.0, 300.0, 400.0, 500.0, 520.0, 510.0))
    assert growth.share == pytest.approx(0.02)
    assert growth.text() == "RSS after case 5: 500 MiB; after case 7: 510 MiB (+2.0%); highest: 520 MiB"


def test_the_course_has_ten_moments() -> None:
    assert Growth(tuple(float(n) for n in range(1, 21))).course() == (
        "2: 2, 4: 4, 6: 6, 8: 8, 10: 10, 12: 12, 14: 14, 16: 16, 18: 18, 20: 20"
    )


def test_few_cases_tell_nothing(tmp_path: Path) -> None:
    with pytest.raises(SoakError, match=r"^5 cases tell nothing; give more than 5\Z"):
        soak([tmp_path], 5)


def test_a_case_that_fails_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.nii.gz"
    path.write_bytes(b"no CT")
    assert main(["soak", str(path), "--cases", "6"]) == 2
    assert capsys.readouterr().err == "error: 0 of 6 cases were done (exit code 2)\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is steady on Linux alone")
def test_memory_does_not_grow_over_thirty_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # glibc keeps freed blocks and takes more in leaps of 50 MiB, at whichever case two threads first want them at
    # once. With every large block handed back when freed, what stays is what leaks.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**18))
    paths = []
    for seed, size in ((1, (96, 96, 45)), (2, (80, 110, 50)), (3, (110, 90, 40))):
        image, _ = make_phantom(size, (4.0, 4.0, 6.6), seed=seed)
        paths.append(tmp_path / f"{seed}.nii.gz")
        nib.save(image, paths[-1])
    growth = soak(paths, 30)
    print(growth.text())
    assert growth.share <= MOST_GROWTH
