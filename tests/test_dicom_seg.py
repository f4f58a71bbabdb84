import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("highdicom", reason="DICOM SEG needs the extra dicom")

import pydicom

from fastorgan.dicom import DicomError, Series, find_series
from fastorgan.dicom_seg import save_segmentation
from fastorgan.errors import VolumeError
from fastorgan.labels import ORGANS
from tests.dicom_series import write_series


@pytest.fixture
def codes() -> NDArray[np.uint8]:
    """Labels (k, rows, columns) with all organs but the pancreas; the last slice has none."""
    codes = np.zeros((12, 10, 8), np.uint8)
    codes[2:8, 2:7, 1:4] = 1
    codes[1:4, 7:9, 2:3] = codes[1:4, 7:9, 6:7] = 2
    codes[6:10, 3:5, 6:8] = 3
    return codes


def series_of(folder: Path, **options: Any) -> Series:
    write_series(folder, np.zeros((12, 10, 8), np.int16), **options)
    (series,) = find_series(folder)
    return series


def test_segments_have_codes_colours_and_the_slices_that_they_refer_to(
    tmp_path: Path, codes: NDArray[np.uint8]
) -> None:
    series = series_of(tmp_path / "ct")
    target = tmp_path / "organs.seg.dcm"
    assert save_segmentation(codes.transpose(2, 1, 0), series, target) == []
    seg = pydicom.dcmread(target)
    assert (seg.Modality, seg.SegmentationType, seg.SeriesNumber) == ("SEG", "BINARY", 1003)
    ct = pydicom.dcmread(series.slices[0].path)
    for same in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert seg[same].value == ct[same].value
    assert seg.SeriesInstanceUID != ct.SeriesInstanceUID
    kinds = [s.SegmentedPropertyTypeCodeSequence[0] for s in seg.SegmentSequence]
    assert [(k.CodingSchemeDesignator, k.CodeValue, k.CodeMeaning) for k in kinds] == [
        ("SCT", "10200004", "Liver"),
        ("SCT", "64033007", "Kidney"),
        ("SCT", "78961009", "Spleen"),
    ]
    assert {s.SegmentAlgorithmType for s in seg.SegmentSequence} == {"AUTOMATIC"}
    referred = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred <= {pydicom.dcmread(s.path).SOPInstanceUID for s in series.slices}
    # Six slices of liver, three of kidney, four of spleen.
    assert seg.NumberOfFrames == 13


def test_dcmqi_reads_the_same_voxels_in_the_same_place(tmp_path: Path, codes: NDArray[np.uint8]) -> None:
    sitk = pytest.importorskip("SimpleITK")
    tool = shutil.which(
        "segimage2itkimage", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    )
    if tool is None:
        pytest.skip("dcmqi is not installed")
    series = series_of(tmp_path / "ct", orientation=(0.96, 0.28, 0, -0.28, 0.96, 0))
    target = tmp_path / "organs.seg.dcm"
    save_segmentation(codes.transpose(2, 1, 0), series, target)
    (tmp_path / "out").mkdir()
    command = [tool, "--inputDICOM", str(target), "--outputDirectory", str(tmp_path / "out"), "--outputType", "nrrd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ct = sitk.ImageSeriesReader()
    ct.SetFileNames([str(part.path) for part in series.slices])
    grid = ct.Execute()
    for number, organ in enumerate(ORGANS[:3], 1):
        found = sitk.ReadImage(str(tmp_path / "out" / f"{number}.nrrd"))
        # dcmqi's image is as tall as the segment's frames: it is set into the CT's grid by its place in the patient.
        found = sitk.Resample(found, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        assert np.array_equal(sitk.GetArrayFromImage(found) > 0, codes == organ.code), organ.name
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    labels = [segment["SegmentLabel"] for group in meta["segmentAttributes"] for segment in group]
    assert labels == ["Liver", "Kidney", "Spleen"]


def test_segments_are_numbered_without_a_gap(tmp_path: Path, codes: NDArray[np.uint8]) -> None:
    import highdicom as hd

    codes[codes == 2] = 0
    target = tmp_path / "organs.seg.dcm"
    save_segmentation(codes.transpose(2, 1, 0), series_of(tmp_path / "ct"), target)
    seg = hd.seg.segread(target)
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["Liver", "Spleen"]
    spleen = seg.get_volume(segment_numbers=[2], combine_segments=True).array
    assert spleen.astype(bool).sum() == (codes == 3).sum()


def test_slices_that_were_missing_have_no_frame(tmp_path: Path, codes: NDArray[np.uint8]) -> None:
    series = series_of(tmp_path / "ct", leave_out=(3,))
    target = tmp_path / "organs.seg.dcm"
    save_segmentation(codes.transpose(2, 1, 0), series, target)
    assert pydicom.dcmread(target).NumberOfFrames == 11


def test_without_an_organ_nothing_is_written(tmp_path: Path) -> None:
    series = series_of(tmp_path / "ct")
    target = tmp_path / "organs.seg.dcm"
    said = save_segmentation(np.zeros((8, 10, 12), np.uint8), series, target)
    assert said == ["no organ was found, so no DICOM SEG was written"]
    assert not target.exists()


def test_a_series_without_the_patients_attributes_is_enough(tmp_path: Path, codes: NDArray[np.uint8]) -> None:
    bare = dict.fromkeys(("PatientName", "PatientID", "PatientBirthDate", "StudyID", "AccessionNumber", "StudyTime"))
    series = series_of(tmp_path / "ct", **bare)
    assert save_segmentation(codes.transpose(2, 1, 0), series, tmp_path / "organs.seg.dcm") == []
    assert pydicom.dcmread(tmp_path / "organs.seg.dcm").PatientID == ""


def test_a_series_without_a_frame_of_reference_is_refused_in_one_line(tmp_path: Path, codes: NDArray[np.uint8]) -> None:
    series = series_of(tmp_path / "ct", FrameOfReferenceUID=None)
    with pytest.raises(VolumeError, match="no DICOM SEG can be made of this series") as caught:
        save_segmentation(codes.transpose(2, 1, 0), series, tmp_path / "organs.seg.dcm")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "ct"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, codes: NDArray[np.uint8]) -> None:
    series = series_of(tmp_path / "ct")
    with pytest.raises(VolumeError, match=r"organs\.seg\.dcm: cannot be written"):
        save_segmentation(codes.transpose(2, 1, 0), series, tmp_path / "none" / "organs.seg.dcm")


def test_without_highdicom_the_extra_is_named(
    tmp_path: Path, codes: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    series = series_of(tmp_path / "ct")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(DicomError, match=r"pip install 'fastorgan\[dicom\]'"):
        save_segmentation(codes.transpose(2, 1, 0), series, tmp_path / "organs.seg.dcm")
