import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.errors import VolumeError
from fastorgan.labels import CLASSES, IGNORE
from fastorgan.volume import load_image
from tests.synthetic_cache import anatomy, grey
from training.cache import STRUCTURES, CachedVolume, cache_case, load_cache, prepare
from training.cases import Case, DataError, find_cases


def write_case(
    folder: Path,
    image: NDArray[Any],
    labels: NDArray[Any],
    spacing: tuple[float, float, float],
    name: str = "a",
    affine: NDArray[np.float64] | None = None,
) -> Case:
    """Write an image in HU and its labels, both (z, y, x) with spacing in that order, as RAS files."""
    placed = np.diag([*spacing[::-1], 1.0]) if affine is None else affine
    paths = folder / f"{name}_0000.nii", folder / f"{name}.nii"
    for array, path in zip((image, labels), paths, strict=True):
        nib.save(nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), placed), path)
    return Case(name, f"patient of {name}", *paths)


def ramp(shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """HU that rise over the whole window and beyond, another value at almost every voxel."""
    return np.linspace(-400, 500, int(np.prod(shape))).reshape(shape).astype(np.int16)


# What is in the cache


def test_coarse_slices_stay_as_they_are(tmp_path: Path) -> None:
    shape, spacing = (12, 16, 20), (5.0, 3.0, 3.0)
    hu, codes = ramp(shape), np.zeros(shape, np.uint8)
    codes[3:9, 4:12, 2:8] = 1
    codes[4:6, 4:6, 12:15] = 4
    organs, roi = cache_case(write_case(tmp_path, hu, codes, spacing))
    levels = np.rint(np.clip((hu.astype(float) + 200) / 500, 0, 1) * 255)
    for volume in (organs, roi):
        assert (volume.name, volume.patient) == ("a", "patient of a")
        assert volume.image.dtype == volume.labels.dtype == np.uint8
        assert np.abs(volume.image - levels).max() <= 1
        assert np.mean(volume.image != levels) < 0.01
        assert volume.spacing.tolist() == list(spacing)
        assert volume.origin_mm.tolist() == [0, 0, 0]
        assert volume.scan_mm.tolist() == [60, 48, 60]
        assert volume.organs_mm.tolist() == [[15, 12, 6], [45, 36, 45]]
    assert np.array_equal(organs.labels, codes)
    assert np.array_equal(roi.labels, np.where(codes > 0, 255, 0))


def test_fine_slices_are_averaged(tmp_path: Path) -> None:
    # Twice as fine as either cache: 1.25 mm and 0.75 mm for the organ net, half of that again for the ROI net's 3 mm.
    shape, spacing = (16, 32, 32), (1.25, 0.75, 0.75)
    hu = np.broadcast_to(np.arange(32) * 10 - 160, shape).astype(np.int16)
    codes = np.zeros(shape, np.uint8)
    codes[:, :, 16:] = 1
    organs, roi = cache_case(write_case(tmp_path, hu, codes, spacing))
    assert organs.image.shape == organs.labels.shape == (8, 16, 16)
    assert organs.spacing.tolist() == [2.5, 1.5, 1.5]
    assert np.array_equal(organs.labels, anatomy_half((8, 16, 16)))
    # Between two voxels the ramp's value is their mean: -155, -135, ... HU, away from the ends.
    inner = organs.image[4, 8, 1:-1] / 255 * 500 - 200
    assert np.abs(inner - (np.arange(1, 15) * 20 - 155)).max() <= 0.5 * 500 / 255 + 1e-6
    assert roi.image.shape == (7, 8, 8)
    assert roi.spacing == pytest.approx([20 / 7, 3, 3])
    assert organs.organs_mm.tolist() == roi.organs_mm.tolist() == [[0, 0, 12], [20, 24, 24]]


def anatomy_half(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    codes = np.zeros(shape, np.uint8)
    codes[:, :, shape[2] // 2 :] = 1
    return codes


def test_the_roi_nets_target_is_the_share_of_organs(tmp_path: Path) -> None:
    shape = (4, 8, 32)
    codes = np.zeros(shape, np.uint8)
    codes[:, :, 16:] = np.array([1, 2, 3, 4])[:, None, None]
    codes[:, :, 28:] = 255
    _, roi = cache_case(write_case(tmp_path, np.zeros(shape, np.int16), codes, (3.0, 3.0, 1.5)))
    # Halving weighs four neighbours 1 : 3 : 3 : 1, so the voxels beside an edge hold an eighth of what is beyond it.
    row = [0] * 7 + [32, 223] + [255] * 4 + [223, 32, 0]
    assert roi.labels[2, 4].tolist() == row


def test_unknown_voxels_stay_unknown_and_frame_nothing(tmp_path: Path) -> None:
    shape = (10, 10, 10)
    codes = np.zeros(shape, np.uint8)
    codes[4:6, 4:6, 4:6] = 3
    codes[:2] = 255
    organs, roi = cache_case(write_case(tmp_path, np.zeros(shape, np.int16), codes, (4.0, 4.0, 4.0)))
    assert np.array_equal(organs.labels, codes)
    assert organs.organs_mm.tolist() == [[16, 16, 16], [24, 24, 24]]
    assert not roi.labels[:2].any()


def test_voxels_that_are_mostly_unknown_are_unknown(tmp_path: Path) -> None:
    shape = (4, 8, 32)
    codes = np.ones(shape, np.uint8)
    codes[:, :, 10:] = 255
    organs, _ = cache_case(write_case(tmp_path, np.zeros(shape, np.int16), codes, (2.5, 1.5, 0.75)))
    assert organs.labels[0, 0].tolist() == [1] * 5 + [255] * 11


def test_only_the_surroundings_of_the_organs_are_kept_for_the_organ_net(tmp_path: Path) -> None:
    shape, spacing = (100, 100, 120), (5.0, 5.0, 5.0)
    codes = np.zeros(shape, np.uint8)
    codes[48:52, 48:52, 58:62] = 2
    organs, roi = cache_case(write_case(tmp_path, np.zeros(shape, np.int16), codes, spacing))
    # 20 mm of organ and 12 mm of margin on both sides grow to 150 x 170 x 250 mm; 60 mm are kept around that.
    assert organs.image.shape == (54, 58, 74)
    assert organs.origin_mm.tolist() == [115, 105, 115]
    assert organs.scan_mm.tolist() == [500, 500, 600]
    assert np.argwhere(organs.labels == 2).min(axis=0).tolist() == [25, 27, 35]
    assert roi.image.shape == shape
    assert roi.origin_mm.tolist() == [0, 0, 0]


def with_structures(case: Case, structures: NDArray[Any]) -> Case:
    """The case with further organs (z, y, x), written beside its labels."""
    path = case.labels.with_name("structures.nii")
    affine = load_image(case.labels).affine
    nib.save(nib.Nifti1Image(np.ascontiguousarray(structures.transpose(2, 1, 0)), affine), path)
    return replace(case, structures=path)


def test_structures_are_kept_where_no_organ_is(tmp_path: Path) -> None:
    shape, spacing = (12, 16, 20), (5.0, 3.0, 3.0)
    codes = np.zeros(shape, np.uint8)
    codes[3:9, 4:12, 2:8] = 1
    codes[3:9, 4:12, 17:18] = IGNORE
    case = write_case(tmp_path, ramp(shape), codes, spacing)
    plain, plain_roi = cache_case(case)
    assert not plain.has_structures
    marks = np.zeros(shape, np.uint8)
    # FLARE22's liver, smaller than ours; a stomach beyond it and on unknown ground; its left kidney, no structure.
    marks[4:8, 5:11, 3:7] = 1
    marks[3:9, 4:12, 6:12] = 11
    marks[3:9, 4:12, 17:18] = 11
    marks[3:9, 12:14, 2:8] = 13
    organs, roi = cache_case(with_structures(case, marks))
    expected = codes.copy()
    expected[3:9, 4:12, 8:12] = 11
    assert np.array_equal(organs.labels, expected)
    assert organs.has_structures
    assert STRUCTURES[11 - CLASSES] == "stomach"
    # They change neither the frame nor what the ROI net looks for.
    assert np.array_equal(organs.organs_mm, plain.organs_mm)
    assert np.array_equal(roi.labels, plain_roi.labels)


def test_structures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    codes = anatomy((12, 16, 20))
    case = write_case(tmp_path, ramp(codes.shape), codes, (5.0, 3.0, 3.0))
    with pytest.raises(DataError, match=r"structures\.nii: holds labels other than 0 to 13 and 255"):
        cache_case(with_structures(case, np.full(codes.shape, 14, np.uint8)))
    with pytest.raises(DataError, match=r"structures\.nii: shape or affine differ"):
        cache_case(with_structures(case, np.zeros((12, 16, 19), np.uint8)))


def test_the_files_axes_do_not_matter(tmp_path: Path) -> None:
    shape = (10, 14, 18)
    codes = anatomy(shape)
    hu = grey(codes).astype(np.int16) + ramp(shape) // 20
    plain = cache_case(write_case(tmp_path, hu, codes, (5.0, 3.0, 2.0), "plain"))
    # LPS, as many scanners write: the first two axes of the file run the other way.
    turned = np.diag([-2.0, -3.0, 5.0, 1.0])
    turned[:2, 3] = 2.0 * 17, 3.0 * 13
    flipped = cache_case(
        write_case(tmp_path, hu[:, ::-1, ::-1], codes[:, ::-1, ::-1], (5.0, 3.0, 2.0), "turned", turned)
    )
    for first, second in zip(plain, flipped, strict=True):
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.labels, second.labels)
        assert np.array_equal(first.organs_mm, second.organs_mm)


def test_labels_with_a_slope(tmp_path: Path) -> None:
    shape = (6, 6, 6)
    codes = np.zeros(shape, np.uint8)
    codes[2:4] = 4
    case = write_case(tmp_path, np.zeros(shape, np.int16), codes // 2, (5.0, 5.0, 5.0))
    # nibabel sets a slope of its own choice on saving; scl_slope and scl_inter are the 4-byte floats at byte 112.
    content = bytearray(case.labels.read_bytes())
    content[112:120] = struct.pack("<ff", 2.0, 0.0)
    case.labels.write_bytes(content)
    assert np.asarray(load_image(case.labels).dataobj).max() == 4
    assert np.array_equal(cache_case(case)[0].labels, codes)


# What is refused


def test_labels_of_another_shape_are_refused(tmp_path: Path) -> None:
    case = write_case(tmp_path, np.zeros((6, 6, 6), np.int16), np.ones((6, 6, 6), np.uint8), (5.0, 5.0, 5.0))
    other = write_case(tmp_path, np.zeros((6, 6, 7), np.int16), np.ones((6, 6, 7), np.uint8), (5.0, 5.0, 5.0), "b")
    with pytest.raises(DataError, match="shape or affine differ") as caught:
        cache_case(Case("a", "a", case.image, other.labels))
    assert str(case.image) in str(caught.value)
    assert str(other.labels) in str(caught.value)


def test_labels_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    shape = (6, 6, 6)
    case = write_case(tmp_path, np.zeros(shape, np.int16), np.ones(shape, np.uint8), (5.0, 5.0, 5.0))
    other = write_case(tmp_path, np.zeros(shape, np.int16), np.ones(shape, np.uint8), (5.0, 5.0, 5.5), "b")
    with pytest.raises(DataError, match="shape or affine differ"):
        cache_case(Case("a", "a", case.image, other.labels))


@pytest.mark.parametrize("code", [5, 13, 254, 256, 257, -1])
def test_labels_that_are_no_organ_are_refused(tmp_path: Path, code: int) -> None:
    labels = np.ones((6, 6, 6), np.int16)
    labels[3, 3, 3] = code
    case = write_case(tmp_path, np.zeros((6, 6, 6), np.int16), labels, (5.0, 5.0, 5.0))
    with pytest.raises(DataError, match="holds labels other than 0 to 4 and 255"):
        cache_case(case)


@pytest.mark.parametrize("code", [0, 255])
def test_labels_without_an_organ_are_refused(tmp_path: Path, code: int) -> None:
    shape = (6, 6, 6)
    case = write_case(tmp_path, np.zeros(shape, np.int16), np.full(shape, code, np.uint8), (5.0, 5.0, 5.0))
    with pytest.raises(DataError, match="holds no organ"):
        cache_case(case)


def test_an_oblique_scan_is_refused(tmp_path: Path) -> None:
    shape = (6, 6, 6)
    tilt = np.eye(4)
    cosine, sine = np.cos(np.radians(20)), np.sin(np.radians(20))
    tilt[1:3, 1:3] = [[cosine, -sine], [sine, cosine]]
    case = write_case(tmp_path, np.zeros(shape, np.int16), np.ones(shape, np.uint8), (1, 1, 1), affine=tilt)
    with pytest.raises(DataError, match="oblique"):
        cache_case(case)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    case = write_case(tmp_path, np.zeros((6, 6, 6), np.int16), np.ones((6, 6, 6), np.uint8), (5.0, 5.0, 5.0))
    case.image.write_bytes(b"no NIfTI file")
    with pytest.raises(VolumeError, match=r"a_0000\.nii"):
        cache_case(case)


# Files


def same(a: CachedVolume, b: CachedVolume) -> bool:
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for key in a.__dict__)


def test_flare21s_own_folders_become_a_cache(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "runs" / "cache"
    shape = (8, 10, 12)
    for folder in ("TrainingImg", "TrainingMask"):
        (data / folder).mkdir(parents=True)
    for number in (1, 0):
        codes = anatomy(shape)
        case = write_case(tmp_path, grey(codes).astype(np.int16) + number, codes, (5.0, 3.0, 3.0))
        name = f"train_{number:03}"
        nib.save(nib.load(case.image), data / "TrainingImg" / f"{name}_0000.nii.gz")
        nib.save(nib.load(case.labels), data / "TrainingMask" / f"{name}.nii.gz")
    cases = find_cases(data)
    assert list(prepare(cases, out)) == cases
    expected = [f"train_{number:03}.{kind}.npz" for number in (0, 1) for kind in ("organs", "roi")]
    assert sorted(path.name for path in out.iterdir()) == expected
    for index, kind in enumerate(("organs", "roi")):
        volumes = load_cache(out, kind)
        assert [volume.name for volume in volumes] == ["train_000", "train_001"]
        for volume, case in zip(volumes, cases, strict=True):
            assert same(volume, cache_case(case)[index])


def test_an_empty_folder_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.roi\.npz files; they come from `python -m training prepare`"):
        load_cache(tmp_path / "nowhere", "roi")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    volume = cache_case(
        write_case(tmp_path, np.zeros((6, 6, 6), np.int16), np.ones((6, 6, 6), np.uint8), (5.0, 5.0, 5.0))
    )[0]
    whole = tmp_path / "a.organs.npz"
    volume.save(whole)
    content = whole.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2], content[:300] + b"\xff" * 40 + content[340:]):
        whole.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.organs\.npz: damaged, or not a cache file"):
            load_cache(tmp_path, "organs")
    np.savez(whole, other=np.zeros(3))
    with pytest.raises(DataError, match=r"a\.organs\.npz: damaged, or not a cache file"):
        load_cache(tmp_path, "organs")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (6, 6, 6)
    volume = cache_case(write_case(tmp_path, np.zeros(shape, np.int16), np.ones(shape, np.uint8), (5.0, 5.0, 5.0)))[0]
    out = tmp_path / "cache"
    out.mkdir()

    def break_off(stream: Any, **arrays: Any) -> None:
        stream.write(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", break_off)
    with pytest.raises(KeyboardInterrupt):
        volume.save(out / "a.organs.npz")
    with pytest.raises(DataError, match="no"):
        load_cache(out, "organs")
