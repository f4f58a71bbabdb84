from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.labels import IGNORE

torch = pytest.importorskip("torch")

from tests.synthetic_cache import anatomy, cached, grey, one_thread, write_cache  # noqa: E402
from training import warp as warping  # noqa: E402
from training.__main__ import main  # noqa: E402
from training.cache import CachedVolume, load_cache  # noqa: E402
from training.cases import DataError  # noqa: E402
from training.warp import Deformation, Shape, find_shapes, find_whole, is_whole, kidneys_apart, register, warp, warp_all  # noqa: E402

SHAPE, SPACING = (48, 60, 88), (4.0, 3.75, 3.75)
"""A body of 192 x 225 x 330 mm, with four ellipsoids as organs."""


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def blank(shape: tuple[int, int, int] = (10, 10, 10)) -> NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


def shape_of(codes: NDArray[np.uint8], spacing: Sequence[float] = SPACING) -> Shape:
    return Shape("s", codes, np.asarray(spacing))


def centre(codes: NDArray[np.uint8], code: int, spacing: Sequence[float]) -> NDArray[np.float64]:
    """In mm from the array's first corner."""
    place: NDArray[np.float64] = (np.argwhere(codes == code).mean(axis=0) + 0.5) * spacing
    return place


def moved(deformation: Deformation, place: NDArray[np.float64]) -> NDArray[np.float64]:
    point = torch.as_tensor(place, dtype=torch.float32)[:, None, None, None]
    return deformation(point)[:, 0, 0, 0].numpy()


def write_map(path: Path, codes: NDArray[np.uint8], spacing: Sequence[float], axes: str = "RAS") -> Path:
    """Write upright codes (z, y, x) as a NIfTI whose array axes run as `axes` say."""
    image = nib.Nifti1Image(np.ascontiguousarray(codes.transpose(2, 1, 0)), np.diag([*spacing[::-1], 1.0]))
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(turn), path)
    return path


# Shapes


def test_kidneys_are_told_apart_by_the_middle_of_liver_and_spleen() -> None:
    codes = blank()
    codes[5, 5, 9], codes[5, 5, 1] = 1, 3
    # The middle is at column 5, to whose left, seen in the array, the patient's left lies.
    codes[2, 2, [3, 4, 5, 7]] = 2
    assert kidneys_apart(codes)[2, 2].tolist() == [0, 0, 0, 13, 13, 2, 0, 2, 0, 0]


def test_kidneys_that_are_apart_stay_so() -> None:
    codes = blank()
    codes[5, 5, 9], codes[5, 5, 1], codes[2, 2, 1], codes[2, 2, 2] = 1, 3, 2, 13
    assert kidneys_apart(codes) is codes


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR"])
def test_a_label_map_is_read_upright(tmp_path: Path, axes: str) -> None:
    codes, spacing = blank((6, 7, 8)), (5.0, 2.0, 1.0)
    codes[4, 1, 7], codes[3, 2, 0], codes[2, 5, 3], codes[1, 1, 2], codes[1, 1, 6] = 1, 3, 4, 2, 2
    shape = Shape.read(write_map(tmp_path / "m.nii.gz", codes, spacing, axes))
    expected = codes.copy()
    expected[1, 1, 2] = 13
    assert shape.name == "m"
    np.testing.assert_array_equal(shape.codes, expected)
    assert shape.spacing.tolist() == [5.0, 2.0, 1.0]
    assert shape.size_mm.tolist() == [30.0, 14.0, 8.0]


def test_a_map_without_pancreas_is_no_shape(tmp_path: Path) -> None:
    codes = blank()
    codes[1, 1, 1], codes[2, 2, 2] = 1, 3
    with pytest.raises(DataError, match=r"m\.nii\.gz: holds no pancreas; a shape needs it\Z"):
        Shape.read(write_map(tmp_path / "m.nii.gz", codes, SPACING))


def test_a_map_of_other_codes_is_no_shape(tmp_path: Path) -> None:
    codes = np.arange(1000, dtype=np.int16).reshape(10, 10, 10) % 40
    with pytest.raises(DataError, match=r"m\.nii\.gz: holds labels other than 0 to 13 and 255\Z"):
        Shape.read(write_map(tmp_path / "m.nii.gz", codes.astype(np.uint8), SPACING))


def test_a_folder_without_maps(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.nii\.gz files; shapes are label maps\Z"):
        find_shapes(tmp_path)


# Which scans


def test_a_scan_is_whole_with_four_organs_of_which_kidneys_may_be_cut() -> None:
    volume = cached(anatomy(SHAPE), SPACING)
    assert is_whole(volume)
    for code in (1, 2, 3, 4):
        assert not is_whole(replace(volume, labels=np.where(volume.labels == code, np.uint8(0), volume.labels)))
    for code, may in ((1, False), (2, True), (3, False), (4, False)):
        # The scan begins in the middle of the organ.
        first = round(float(np.argwhere(volume.labels == code)[:, 0].mean()))
        labels = volume.labels.copy()
        labels[:first][labels[:first] == code] = 0
        labels[0][labels[first] == code] = code
        assert is_whole(replace(volume, labels=labels)) == may


def test_a_quarter_of_the_largest_section_at_an_end_is_no_cut() -> None:
    codes = np.zeros((4, 2, 4), np.uint8)
    codes[1], codes[2, :, :3], codes[3, 0, :2] = 3, 3, 3
    assert not warping._is_cut(codes, 3)
    codes[3, 0, 2] = 3
    assert warping._is_cut(codes, 3)
    assert warping._is_cut(codes[::-1], 3)


# Registration


def test_a_scan_stays_where_it_is_under_its_own_shape() -> None:
    codes = anatomy(SHAPE)
    deformation = register(shape_of(kidneys_apart(codes)), shape_of(kidneys_apart(codes)))
    assert min(deformation.dsc.values()) > 0.99
    for code in (1, 3, 4):
        place = centre(codes, code, SPACING)
        np.testing.assert_allclose(moved(deformation, place), place, atol=2.5)


def test_a_shifted_and_stretched_shape_is_found_where_it_is() -> None:
    codes = kidneys_apart(anatomy(SHAPE))
    # The same voxels, wider by a fifth, and further from the corner by 10 slices of 4 mm.
    wide = (4.0, 3.75, 4.5)
    shape = np.concatenate((np.zeros((10, *SHAPE[1:]), np.uint8), codes))
    deformation = register(shape_of(codes), shape_of(shape, wide))
    assert min(deformation.dsc.values()) > 0.98
    for code in (1, 3, 4):
        np.testing.assert_allclose(
            moved(deformation, centre(shape, code, wide)), centre(codes, code, SPACING), atol=2.5
        )


def test_a_kidney_that_is_cut_is_not_drawn_out_to_a_whole_one() -> None:
    codes = kidneys_apart(anatomy(SHAPE))
    deformation = register(shape_of(codes[14:]), shape_of(codes))
    # The lower half of the kidney is not in the scan.
    assert set(deformation.dsc) == {1, 3, 4}


def test_nothing_folds_where_an_organ_must_go_far() -> None:
    codes = kidneys_apart(anatomy(SHAPE))
    other = codes.copy()
    other[other == 4] = 0
    # The pancreas of the shape lies 45 mm further to the front, in place of nothing.
    pancreas = np.argwhere(codes == 4) + np.array([0, 12, 0])
    other[tuple(pancreas[pancreas[:, 1] < SHAPE[1]].T)] = 4
    deformation = register(shape_of(codes), shape_of(other))
    assert deformation.dsc[4] > 0.8
    axes = [
        torch.arange(float(low), float(high), 4.0) for low, high in zip(deformation.low, deformation.high, strict=True)
    ]
    places = deformation(torch.stack(torch.meshgrid(*axes, indexing="ij")))
    for axis in range(3):
        assert float(torch.diff(places[axis], dim=axis).min()) > 0


# Warped scans


@pytest.fixture(scope="module")
def other_shape() -> Shape:
    """The anatomy with a liver that is smaller, and a spleen that is larger."""
    codes = anatomy(SHAPE)
    places = np.meshgrid(*((np.arange(n) + 0.5) / n for n in SHAPE), indexing="ij")
    codes[np.isin(codes, (1, 3))] = 0
    for code, where, half in ((1, (0.62, 0.55, 0.74), (0.2, 0.26, 0.18)), (3, (0.6, 0.4, 0.18), (0.24, 0.22, 0.13))):
        distance = sum(((p - c) / h) ** 2 for p, c, h in zip(places, where, half, strict=True))
        codes[(distance < 1) & (codes == 0)] = code
    return Shape("other", kidneys_apart(codes), np.array(SPACING))


@pytest.fixture(scope="module")
def warped(other_shape: Shape) -> tuple[CachedVolume, dict[int, float]]:
    return warp(cached(anatomy(SHAPE), SPACING, name="a", patient="p"), other_shape)


def test_image_and_labels_take_the_shape_together(
    warped: tuple[CachedVolume, dict[int, float]], other_shape: Shape
) -> None:
    result, fit = warped
    assert (result.name, result.patient) == ("a.other", "p")
    assert min(fit.values()) > 0.95
    # Where the labels of a warped scan say liver, its image is the liver's grey.
    known = result.labels != IGNORE
    assert np.mean(np.abs(grey(result.labels).astype(int) - result.image)[known] <= 2) > 0.9
    volumes = {code: (result.labels == code).sum() * result.spacing.prod() for code in (1, 3)}
    for code, size in volumes.items():
        wanted = (other_shape.codes == code).sum() * np.prod(SPACING)
        own = (anatomy(SHAPE) == code).sum() * np.prod(SPACING)
        assert abs(size - wanted) < 0.2 * abs(own - wanted)


def test_a_warped_scan_lies_in_the_frame_of_its_arrays(warped: tuple[CachedVolume, dict[int, float]]) -> None:
    result, _ = warped
    assert result.origin_mm.tolist() == [0, 0, 0]
    np.testing.assert_allclose(result.scan_mm, np.array(result.image.shape) * result.spacing)
    found = np.argwhere((result.labels > 0) & (result.labels < 5))
    np.testing.assert_allclose(result.organs_mm, [found.min(0) * result.spacing, (found.max(0) + 1) * result.spacing])


def test_what_the_cache_does_not_hold_is_unknown(other_shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warping, "STAGES", warping.STAGES[:2])
    volume = cached(anatomy(SHAPE), SPACING)
    cropped = replace(volume, image=volume.image[:, :, 4:-4], labels=volume.labels[:, :, 4:-4])
    result, _ = warp(cropped, other_shape)
    # The shape's organs lie some 30 mm from the sides of what is cached, 60 mm are shown.
    assert (result.labels[:, :, 0] == IGNORE).all()
    assert (result.labels[:, :, -1] == IGNORE).all()
    assert (result.labels[result.labels.shape[0] // 2] != IGNORE).mean() > 0.4


# All of them


def write_shapes(folder: Path, count: int) -> list[Path]:
    return [write_map(folder / f"m{number}.nii.gz", anatomy(SHAPE), SPACING) for number in range(count)]


def test_shapes_are_dealt_evenly_and_none_twice_to_a_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = [cached(anatomy((12, 15, 22)), (16.0, 15.0, 15.0), name=f"v{number}") for number in range(6)]
    monkeypatch.setattr(warping, "warp", lambda volume, shape: (volume, {1: 0.9}))
    shapes = write_shapes(tmp_path / "maps", 4)
    names = [warped.name for warped in warp_all(volumes, shapes, tmp_path / "out", 2, 0)]
    assert len(set(names)) == 12
    assert {name: sum(n.endswith(name) for n in names) for name in ("m0", "m1", "m2", "m3")} == dict.fromkeys(
        ("m0", "m1", "m2", "m3"), 3
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{n}.organs.npz" for n in names)
    again = [warped.text() for warped in warp_all(volumes, shapes, tmp_path / "out", 2, 0)]
    assert again == ["there already"] * 12


def test_a_scan_that_does_not_fit_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = cached(anatomy((12, 15, 22)), (16.0, 15.0, 15.0))
    monkeypatch.setattr(warping, "warp", lambda volume, shape: (volume, {1: 0.97, 4: 0.9, 12: 0.5, 13: 0.84}))
    (warped,) = warp_all([volume], write_shapes(tmp_path / "maps", 1), tmp_path / "out", 1, 0)
    assert warped.text() == "liver 0.970, pancreas 0.900, left kidney 0.840; left out, since it does not fit"
    assert list((tmp_path / "out").iterdir()) == []


def test_without_a_whole_scan_there_is_nothing_to_warp(tmp_path: Path) -> None:
    cached(np.where(anatomy(SHAPE) == 4, np.uint8(0), anatomy(SHAPE)), SPACING).save(tmp_path / "a.organs.npz")
    with pytest.raises(DataError, match=f"{tmp_path}: no scan shows all four organs whole enough"):
        find_whole(tmp_path)


def test_the_command_writes_scans_that_can_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warping, "STAGES", warping.STAGES[:2])
    cache = write_cache(tmp_path / "cache", ["p0", "p1"])
    write_shapes(tmp_path / "maps", 2)
    command = ["warp", "--data", str(cache), "--shapes", str(tmp_path / "maps"), "--out", str(tmp_path / "warped")]
    assert main([*command, "--each", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    volumes = load_cache(tmp_path / "warped", "organs")
    assert [volume.patient for volume in volumes] == ["p0", "p1"]
    for volume in volumes:
        assert {1, 2, 3, 4} <= set(np.unique(volume.labels).tolist())
