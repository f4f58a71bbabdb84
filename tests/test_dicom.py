import math
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("pydicom", reason="DICOM needs the extra dicom")

import pydicom
from pydicom.uid import UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from fastorgan.dicom import DicomError, choose, find_series
from fastorgan.errors import VolumeError
from tests.dicom_series import write_series


@pytest.fixture
def hu() -> NDArray[np.int16]:
    """12 slices of 10 rows and 8 columns, no two of them alike."""
    return np.random.default_rng(0).integers(-1000, 1500, (12, 10, 8)).astype(np.int16)


def read(folder: Path) -> nib.Nifti1Image:
    (series,) = find_series(folder)
    return series.load()


def values(image: nib.Nifti1Image) -> NDArray[Any]:
    return np.asanyarray(image.dataobj)


def edit(path: Path, **tags: Any) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


# Geometry


def test_slices_are_sorted_by_their_place_and_not_by_name(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    write_series(tmp_path, hu)
    image = read(tmp_path)
    assert image.get_data_dtype() == np.int16
    assert np.array_equal(values(image), hu.transpose(2, 1, 0))
    # LPS to RAS: x and y change their signs.
    expected: list[list[float]] = [[-2, 0, 0, 40], [0, -1.5, 0, 30], [0, 0, 3, 100], [0, 0, 0, 1]]
    assert image.affine.tolist() == expected
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    assert np.allclose(image.get_qform(), expected)


OBLIQUE = (
    math.cos(0.2),
    math.sin(0.2),
    0.0,
    -math.sin(0.2) * math.cos(0.3),
    math.cos(0.2) * math.cos(0.3),
    -math.sin(0.3),
)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    "orientation", [(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), OBLIQUE, CORONAL, (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)]
)
def test_the_grid_is_the_one_that_itk_reads(
    tmp_path: Path, hu: NDArray[np.int16], orientation: tuple[float, ...]
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    write_series(tmp_path, hu, orientation=orientation)
    image = read(tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    other = reader.Execute()
    assert np.array_equal(values(image), sitk.GetArrayFromImage(other).transpose(2, 1, 0))
    direction = np.array(other.GetDirection()).reshape(3, 3) * other.GetSpacing()
    flip = np.diag([-1.0, -1.0, 1.0])
    assert np.allclose(image.affine[:3, :3], flip @ direction, atol=1e-4)
    assert np.allclose(image.affine[:3, 3], flip @ other.GetOrigin(), atol=1e-4)


def test_dicom2nifti_agrees_voxel_by_voxel_in_the_patient(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    convert = pytest.importorskip("dicom2nifti.convert_dicom")
    write_series(tmp_path / "in", hu)
    image = nib.as_closest_canonical(read(tmp_path / "in"))
    convert.dicom_series_to_nifti(str(tmp_path / "in"), str(tmp_path / "other.nii"), reorient_nifti=False)
    other = nib.as_closest_canonical(nib.load(tmp_path / "other.nii"))
    assert np.array_equal(values(image), values(other))
    assert np.allclose(image.affine, other.affine, atol=1e-4)


def test_a_tilted_gantry_shears_the_grid_and_is_reported(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    write_series(tmp_path, hu, tilt_degrees=12.0)
    (series,) = find_series(tmp_path)
    image = series.load()
    # Each slice lies 3 mm x tan 12 degrees further to the back (LPS y), so to -y in RAS.
    assert image.affine[:3, 2] == pytest.approx([0, -3 * math.tan(math.radians(12)), 3], abs=1e-4)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 0)
    (warning,) = series.warnings()
    assert warning.startswith("the gantry was tilted by 12.0 degrees")
    assert np.array_equal(values(image), hu.transpose(2, 1, 0))


def test_rounded_positions_are_no_tilt(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    for number, path in enumerate(write_series(tmp_path, hu)):
        position = pydicom.dcmread(path).ImagePositionPatient
        edit(path, ImagePositionPatient=[position[0], position[1] + 0.01 * (number % 2), round(position[2], 2)])
    (series,) = find_series(tmp_path)
    assert series.warnings() == []
    assert series.affine()[:3, 2].tolist() == [0, 0, 3]


# Missing and doubtful slices


def test_missing_slices_are_filled_in_and_reported(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.int16)[:, None, None] * 10, (40, 6, 5))
    write_series(tmp_path, ramp, leave_out=(10, 20, 21))
    (series,) = find_series(tmp_path)
    assert series.warnings() == ["3 of 40 slices are missing (number 11, 21, 22); filled in from their neighbours"]
    assert np.array_equal(values(series.load()), ramp.transpose(2, 1, 0))


@pytest.mark.parametrize(("gone", "lost"), [((4, 5), 2), ((4, 6), 2)])
def test_too_many_missing_slices_are_refused(
    tmp_path: Path, hu: NDArray[np.int16], gone: tuple[int, ...], lost: int
) -> None:
    write_series(tmp_path, hu, leave_out=gone)
    (series,) = find_series(tmp_path)
    with pytest.raises(VolumeError, match=f"{lost} of 12 slices of series 3 Abdomen .* are missing; fetch it again"):
        series.load()


def test_a_wide_gap_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path, np.zeros((60, 4, 4), np.int16), spacing=(1, 1, 5), leave_out=(30, 31, 32))
    (series,) = find_series(tmp_path)
    with pytest.raises(VolumeError, match="3 of 60 slices"):
        series.load()


def test_irregular_slices_are_refused(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    path = write_series(tmp_path, hu)[5]
    edit(path, ImagePositionPatient=[-40, -30, 100 + 5 * 3 + 1.0])
    (series,) = find_series(tmp_path)
    with pytest.raises(VolumeError, match="are 2 to 4 mm apart; resample it"):
        series.load()


def test_a_bent_series_is_refused(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    path = write_series(tmp_path, hu)[5]
    edit(path, ImagePositionPatient=[-40 + 9, -30, 100 + 5 * 3])
    (series,) = find_series(tmp_path)
    with pytest.raises(VolumeError, match="do not lie along a straight line"):
        series.load()


def test_a_slice_that_is_there_twice_is_named(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    paths = write_series(tmp_path, hu)
    twin = tmp_path / "twin.dcm"
    twin.write_bytes(paths[3].read_bytes())
    (series,) = find_series(tmp_path)
    with pytest.raises(VolumeError, match="lies where another slice of its series does") as caught:
        series.load()
    assert any(name in str(caught.value) for name in ("twin.dcm", paths[3].name))


def test_phases_within_one_series_are_told_apart(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    uid = pydicom.uid.generate_uid()
    for phase in (1, 2):
        write_series(tmp_path, hu + phase, AcquisitionNumber=phase, SeriesInstanceUID=uid, file=f"P{phase}_{{}}.dcm")
    first, second = find_series(tmp_path)
    assert {first.name, second.name} == {f"{tmp_path.name}_3", f"{tmp_path.name}_3_2"}
    assert np.array_equal(values(first.load()), (hu + 1).transpose(2, 1, 0))
    assert np.array_equal(values(second.load()), (hu + 2).transpose(2, 1, 0))


# Values


def test_values_become_hu_slice_by_slice(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    paths = write_series(tmp_path, hu)
    stored = pydicom.dcmread(paths[2]).pixel_array
    edit(paths[2], RescaleSlope=2, RescaleIntercept=-2048)
    found = values(read(tmp_path))
    assert np.array_equal(found[:, :, 2], (stored.astype(int) * 2 - 2048).T)
    assert np.array_equal(found[:, :, 3], hu[3].T)


def test_fractions_of_hu_stay(tmp_path: Path) -> None:
    hu = np.full((3, 4, 4), 0.5, np.float32)
    write_series(tmp_path, hu, slope=0.25)
    image = read(tmp_path)
    assert image.get_data_dtype() == np.float32
    assert np.unique(values(image)).tolist() == [0.5]


def test_padding_becomes_air(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    # 63536 as the file has it would be bright metal all around the patient.
    hu[:, 0, :] = 100
    for path in write_series(tmp_path, hu):
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array.copy()
        stored[0] = 63536
        dataset.PixelData = stored.tobytes()
        dataset.add_new("PixelPaddingValue", "US", 63536)
        dataset.save_as(path)
    found = values(read(tmp_path))
    assert (found[:, 0] == -1024).all()
    assert np.array_equal(found[:, 1:], hu.transpose(2, 1, 0)[:, 1:])


def test_without_a_rescale_slope_values_are_hu_and_this_is_said(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    write_series(tmp_path, np.abs(hu), intercept=0.0, RescaleSlope=None, RescaleIntercept=None)
    (series,) = find_series(tmp_path)
    assert series.warnings() == ["slices have no rescale slope; their values were taken for HU"]
    assert np.array_equal(values(series.load()), np.abs(hu).transpose(2, 1, 0))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_compressed_slices_are_read(tmp_path: Path, syntax: UID) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1500, (4, 40, 32)).astype(np.int16)
    for path in write_series(tmp_path, hu):
        dataset = pydicom.dcmread(path)
        try:
            dataset.compress(syntax, generate_instance_uid=False)
        except RuntimeError:
            pytest.skip(f"no encoder of {syntax.name} is installed")
        dataset.save_as(path)
    assert np.array_equal(values(read(tmp_path)), hu.transpose(2, 1, 0))


def test_lossless_jpeg_of_archives_is_read(tmp_path: Path) -> None:
    gdcm = pytest.importorskip("gdcm")
    hu = np.random.default_rng(0).integers(-1000, 1500, (3, 40, 32)).astype(np.int16)
    for path in write_series(tmp_path, hu):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGLosslessSV1
    assert np.array_equal(values(read(tmp_path)), hu.transpose(2, 1, 0))


# Which series


def test_a_study_is_searched_below_its_folder(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    write_series(tmp_path / "CT" / "5mm", hu, number=4, file="I{}")
    write_series(tmp_path / "CT" / "1mm", hu, number=2)
    write_series(tmp_path / "scout", hu[:1], number=1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "MR", hu, number=7, Modality="MR")
    write_series(tmp_path / "capture", hu[:1], number=9, ImagePositionPatient=None)
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "readme.txt").write_text("no DICOM")
    found = find_series(tmp_path)
    assert [(s.slices[0].number, s.name) for s in found] == [(2, "CT_1mm"), (4, "CT_5mm")]
    assert found[1].describe() == "4 Abdomen (12 slices, 2 x 1.5 x 3 mm)"


def test_series_in_one_folder_are_listed_for_a_choice(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    write_series(tmp_path, hu, number=2, description="Lung", file="L{}.dcm")
    write_series(tmp_path, hu + 1, number=5, description="Soft tissue", file="S{}.dcm")
    found = find_series(tmp_path)
    assert [s.name for s in found] == [f"{tmp_path.name}_2", f"{tmp_path.name}_5"]
    with pytest.raises(VolumeError, match="holds 2 series; choose by --series NUMBER, UID or all") as caught:
        choose(found, None, tmp_path)
    assert "2 Lung (12 slices, 2 x 1.5 x 3 mm); 5 Soft tissue (12 slices, 2 x 1.5 x 3 mm)" in str(caught.value)
    assert choose(found, "5", tmp_path) == found[1:]
    assert choose(found, found[0].uid, tmp_path) == found[:1]
    assert choose(found, found[0].uid[-8:], tmp_path) == found[:1]
    assert choose(found, "all", tmp_path) == found
    with pytest.raises(VolumeError, match="no series 7 here, but: 2 Lung"):
        choose(found, "7", tmp_path)


def test_a_single_slice_is_nobodys_choice_but_says_so_alone(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    write_series(tmp_path / "a", hu[:1], number=1)
    (only,) = choose(find_series(tmp_path), None, tmp_path)
    with pytest.raises(VolumeError, match=r"series 1 Abdomen .* is a single slice and no volume"):
        only.load()
    write_series(tmp_path / "b", hu, number=2)
    (meant,) = choose(find_series(tmp_path), None, tmp_path)
    assert meant.slices[0].number == 2


def test_a_folder_without_dicom_has_no_series(tmp_path: Path) -> None:
    (tmp_path / "ct.txt").write_text("nothing")
    assert find_series(tmp_path) == []


# Damaged and hostile files


@pytest.mark.parametrize(
    ("tags", "word"),
    [
        ({"PixelSpacing": None}, "header cannot be used"),
        ({"PixelSpacing": [0, 0]}, "not positive"),
        ({"Rows": 0}, "not positive"),
        ({"RescaleSlope": 0}, "not positive"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "right angles"),
        ({"ImageOrientationPatient": [1, 0, 0]}, "header cannot be used"),
        ({"SamplesPerPixel": 3}, "holds colours"),
    ],
)
def test_a_header_that_makes_no_sense_is_named(
    tmp_path: Path, hu: NDArray[np.int16], tags: dict[str, Any], word: str
) -> None:
    path = write_series(tmp_path, hu)[4]
    edit(path, **tags)
    with pytest.raises(VolumeError, match=word) as caught:
        find_series(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_positions_that_are_no_numbers_are_named(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    path = write_series(tmp_path, hu)[4]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"-40.0\\-30.0\\112.0", b"-40.0\\xxxxx\\112.0"))
    assert path.read_bytes() != content
    with pytest.raises(VolumeError, match="header cannot be used") as caught:
        find_series(tmp_path)
    assert str(path) in str(caught.value)


def test_a_slice_cut_short_is_named(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    path = write_series(tmp_path, hu)[4]
    path.write_bytes(path.read_bytes()[:-20])
    (series,) = find_series(tmp_path)
    with pytest.raises(VolumeError, match="its voxels cannot be read") as caught:
        series.load()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_no_cut_or_flipped_byte_ends_in_a_traceback(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    path = write_series(tmp_path, hu[:3])[1]
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for trial in range(150):
        damaged = bytearray(content[: random.integers(1, len(content))] if trial % 3 == 0 else content)
        for _ in range(3):
            damaged[random.integers(0, len(damaged))] = random.integers(0, 256)
        path.write_bytes(damaged)
        said = None
        try:
            for series in find_series(tmp_path):
                series.load()
        except VolumeError as error:
            said = str(error)
        assert said is None or "\n" not in said


def test_sizes_beyond_any_memory_are_refused(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    for path in write_series(tmp_path, hu[:3]):
        edit(path, Rows=65535, Columns=65535)
    (series,) = find_series(tmp_path)
    with pytest.raises(VolumeError):
        series.load()


def test_a_multi_frame_ct_is_refused_in_one_line(tmp_path: Path, hu: NDArray[np.int16]) -> None:
    write_series(tmp_path, hu[:1], SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    with pytest.raises(VolumeError, match=r"multi-frame \(enhanced\) CT is not read"):
        find_series(tmp_path)


def test_without_pydicom_the_extra_is_named(
    tmp_path: Path, hu: NDArray[np.int16], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path, hu)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DicomError, match=r"pip install 'fastorgan\[dicom\]'"):
        find_series(tmp_path)
