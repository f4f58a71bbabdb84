from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fastorgan.intensity import to_levels, to_unit
from tests.synthetic_cache import as_roi, cached
from training.__main__ import main
from training.cache import STRUCTURES, load_cache
from training.cases import DataError
from training.edges import edge_distance, refine, refined

LIVER, KIDNEY, SPLEEN = 1, 2, 3
ORGAN_HU, FAT_HU = 100.0, -100.0
SHAPE = (13, 14, 30)
SPACING = (2.5, 1.5, 1.5)


def levels(hu: NDArray[np.float64]) -> NDArray[np.uint8]:
    return to_levels(to_unit(hu))


def slab(*edge: float, beyond: float = FAT_HU) -> NDArray[np.float64]:
    """HU of an organ that ends at x = 15, where `edge` lies, with fat or something else beyond."""
    hu = np.full(SHAPE, beyond)
    hu[..., :15] = ORGAN_HU
    hu[..., 15 : 15 + len(edge)] = edge
    return hu


def labelled(end: int, code: int = LIVER) -> NDArray[np.uint8]:
    """An organ's codes that end at x = `end`."""
    codes = np.zeros(SHAPE, np.uint8)
    codes[..., :end] = code
    return codes


def ends(hu: NDArray[np.float64], codes: NDArray[np.uint8], code: int = LIVER) -> list[int]:
    """Where the refined organ ends in each row along x, away from the array's faces."""
    result = refined(cached(codes, SPACING, image=levels(hu))).labels
    rows = result[3:-3, 3:-3] == code
    lengths: NDArray[np.int_] = rows.sum(-1)
    # Each row is one piece from the first voxel on.
    assert np.array_equal(rows, np.arange(SHAPE[2]) < lengths[..., None])
    return sorted({int(length) for length in lengths.flat})


@pytest.mark.parametrize(
    ("edge", "end"),
    [
        ((), 15),
        ((20.0,), 16),
        ((-20.0,), 15),
        ((80.0, 20.0), 17),
        ((80.0, -20.0), 16),
    ],
)
@pytest.mark.parametrize("code", [LIVER, SPLEEN])
def test_a_border_goes_out_to_the_middle_between_organ_and_fat(edge: tuple[float, ...], end: int, code: int) -> None:
    assert ends(slab(*edge), labelled(15, code), code) == [end]


def test_a_border_beyond_the_edge_comes_back() -> None:
    assert ends(slab(), labelled(16)) == [15]
    assert ends(slab(-20.0), labelled(16)) == [15]
    assert ends(slab(20.0), labelled(16)) == [16]


def test_a_border_moves_no_further_than_its_reach() -> None:
    # The third voxel beyond has its centre 3.75 mm from the border.
    assert ends(slab(100.0, 100.0, 100.0), labelled(15)) == [15]
    assert ends(slab(100.0, 100.0), labelled(15)) == [17]


def test_without_fat_beyond_a_border_stays() -> None:
    for beyond in (40.0, -40.0, -200.0):
        assert ends(slab(80.0, beyond=beyond), labelled(15)) == [15]


def test_fat_in_a_poorly_contrasted_organ_is_no_edge() -> None:
    hu = slab(-5.0)
    hu[..., :15] = 10.0
    assert ends(hu, labelled(15)) == [16]
    hu[..., :15] = -25.0
    assert ends(hu, labelled(15)) == [15]


def test_what_lies_beyond_a_gap_is_not_joined() -> None:
    codes = labelled(15)
    hu = slab(-100.0, 60.0)
    assert ends(hu, codes) == [15]


def test_other_organs_keep_their_borders() -> None:
    assert ends(slab(80.0), labelled(15, KIDNEY), KIDNEY) == [15]


@pytest.mark.parametrize("other", [KIDNEY, 4, 5, 4 + len(STRUCTURES), 255])
def test_codes_other_than_background_stay(other: int) -> None:
    codes = labelled(15)
    codes[6, 7, 15] = other
    # What is unknown or something else counts as no fat either.
    codes[6, 7, 22:] = other
    hu = slab(80.0, 60.0)
    result = refined(cached(codes, SPACING, image=levels(hu))).labels
    assert np.array_equal(result == other, codes == other)
    assert (result[6, 2, :17] == LIVER).all()


def test_a_border_at_the_face_of_the_volume_stays() -> None:
    hu = slab(80.0)[..., :18]
    codes = labelled(15)[..., :18]
    assert np.array_equal(refined(cached(codes, SPACING, image=levels(hu))).labels, codes)


def test_a_ball_that_is_labelled_too_small_or_too_large_is_found_again() -> None:
    spacing = np.array((2.5, 1.5, 1.5))
    places = (np.indices((40, 60, 60)) + 0.5) * spacing[:, None, None, None]
    distance = np.linalg.norm(places - np.array((50.0, 45.0, 45.0))[:, None, None, None], axis=0)
    sharp = np.where(distance < 30.0, ORGAN_HU, FAT_HU)
    noise = np.random.default_rng(0).normal(0.0, 15.0, sharp.shape)
    image = levels(gaussian_filter(sharp, 1.2 / spacing) + noise)
    truth = distance < 30.0
    for radius in (28.8, 31.2):
        before = np.where(distance < radius, SPLEEN, 0).astype(np.uint8)
        after = refined(cached(before, spacing.tolist(), image=image)).labels == SPLEEN
        wrong_before, wrong_after = np.sum((before > 0) != truth), np.sum(after != truth)
        assert wrong_after < 0.2 * wrong_before
        # A ball's blurred edge lies a little further in.
        assert after.sum() == pytest.approx(truth.sum(), rel=0.02)


def test_the_labels_of_a_single_slice_stay() -> None:
    volume = cached(labelled(15)[:1], SPACING, image=levels(slab(80.0))[:1])
    assert np.array_equal(refined(volume).labels, volume.labels)


def test_nothing_but_labels_changes() -> None:
    codes = labelled(15)
    volume = cached(codes.copy(), SPACING, image=levels(slab(80.0)), name="a", patient="p")
    result = refined(volume)
    assert np.array_equal(volume.labels, codes)
    for name in ("name", "patient", "image", "spacing", "origin_mm", "scan_mm", "organs_mm"):
        assert np.array_equal(getattr(result, name), getattr(volume, name))
    assert result.labels.dtype == np.uint8


def test_without_such_an_organ_labels_are_the_same() -> None:
    codes = labelled(15, KIDNEY)
    assert np.array_equal(refined(cached(codes, SPACING, image=levels(slab(80.0)))).labels, codes)


@pytest.mark.parametrize(
    ("edge", "end", "mm"),
    [
        # The middle, 0 HU, lies between voxels 14 and 15, by halves; the border is there as well.
        ((), 15, 0.0),
        # 20 / 120 of the way from voxel 15 to 16, two thirds of a voxel beyond the border.
        ((20.0,), 15, 1.0),
        # 100 / 120 of the way from 14 to 15.
        ((-20.0,), 15, 0.5),
        ((-20.0,), 16, -1.0),
    ],
)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("way", [1, -1])
def test_the_distance_of_the_edge_beside_fat(edge: tuple[float, ...], end: int, mm: float, axis: int, way: int) -> None:
    image, codes = (np.moveaxis(array[..., ::way], 2, axis) for array in (levels(slab(*edge)), labelled(end, KIDNEY)))
    distance = edge_distance(cached(codes, SPACING, image=image), KIDNEY)
    assert distance == pytest.approx(mm, abs=0.02)


def test_where_few_rows_show_an_edge_there_is_no_distance() -> None:
    volume = cached(labelled(15), SPACING, image=levels(slab()))
    assert edge_distance(volume, LIVER) is not None
    assert edge_distance(volume, KIDNEY) is None
    # 10 x 14 rows, no fat, and an array too narrow for any row.
    assert edge_distance(cached(labelled(15)[:10], SPACING, image=levels(slab())[:10]), LIVER) is None
    assert edge_distance(cached(labelled(15), SPACING, image=levels(slab(beyond=40.0))), LIVER) is None
    assert edge_distance(cached(labelled(15)[:, :7, 11:18], SPACING, image=levels(slab())[:, :7, 11:18]), LIVER) is None


def test_the_command_writes_what_can_be_trained_on_and_says_what_was_gained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hu = slab(80.0)
    for name, codes in (("a", labelled(15)), ("b", labelled(15, KIDNEY))):
        volume = cached(codes, SPACING, image=levels(hu), name=name)
        (tmp_path / "cache").mkdir(exist_ok=True)
        volume.save(tmp_path / "cache" / f"{name}.organs.npz")
        as_roi(volume).save(tmp_path / "cache" / f"{name}.roi.npz")
    assert main(["refine", "--data", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]) == 0
    # A layer of 13 x 14 voxels has 1.024 ml.
    first_line, second_line = capsys.readouterr().out.splitlines()
    # 80 / 180 of the way from voxel 15 to 16 the row falls to 0 HU.
    assert first_line == "a: +1.0 ml; edges beside fat, mm outwards: liver +1.42 to -0.08"
    assert second_line == "b: +0.0 ml; edges beside fat, mm outwards: kidney +1.42 to +1.42"
    first, second = load_cache(tmp_path / "out", "organs")
    assert (first.labels[..., :16] == LIVER).all()
    assert np.array_equal(second.labels, labelled(15, KIDNEY))


def test_a_folder_without_volumes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.organs\.npz files"):
        list(refine(tmp_path, tmp_path / "out"))
