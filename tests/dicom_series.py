"""DICOM series written from a volume, as a scanner's archive would hold them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

STUDY = generate_uid(entropy_srcs=["fastorgan test study"])
FRAME = generate_uid(entropy_srcs=["fastorgan test frame"])

UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_series(
    folder: Path,
    hu: NDArray[Any],
    *,
    spacing: Sequence[float] = (2.0, 1.5, 3.0),
    origin: Sequence[float] = (-40.0, -30.0, 100.0),
    orientation: Sequence[float] = UPRIGHT,
    tilt_degrees: float = 0.0,
    leave_out: Sequence[int] = (),
    number: int = 3,
    description: str = "Abdomen",
    slope: float = 1.0,
    intercept: float = -1024.0,
    file: str = "IM{:04d}.dcm",
    **tags: Any,
) -> list[Path]:
    """Write one file a slice of `hu`, (k, rows, columns); returns the files.

    Files are named against the order of the slices, so that whoever sorts by name sorts wrongly.

    Args:
        folder: is made.
        hu: values of the slices.
        spacing: mm (along a row, down a column, between slices).
        origin: mm, LPS, of the first voxel.
        orientation: ImageOrientationPatient.
        tilt_degrees: of the gantry: each slice is moved down its columns against the one before.
        leave_out: indices of slices that are not written.
        number, description: of the series.
        slope, intercept: of the stored values.
        file: its number is put in.
        tags: any other attribute by keyword; None takes it out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    step = np.cross(row, column) * spacing[2] + column * spacing[2] * math.tan(math.radians(tilt_degrees))
    series = generate_uid(entropy_srcs=[str(folder), str(number), description, str(tags)])
    paths = []
    for k, plane in enumerate(hu):
        if k in leave_out:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = STUDY, series, FRAME
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Test^Phantom", "phantom", "", "O"
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20260101", "120000", "1", ""
        ds.ReferringPhysicianName = ""
        ds.Modality, ds.SeriesNumber, ds.SeriesDescription = "CT", number, description
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.PositionReferenceIndicator = ""
        ds.Manufacturer = "fastorgan tests"
        ds.KVP, ds.AcquisitionNumber, ds.InstanceNumber = "120", 1, len(hu) - k
        ds.ImagePositionPatient = [round(float(x), 5) for x in np.array(origin) + k * step]
        ds.ImageOrientationPatient = [round(float(x), 8) for x in orientation]
        ds.PixelSpacing, ds.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = slope, intercept, "HU"
        ds.PixelData = np.rint((plane - intercept) / slope).astype("<u2").tobytes()
        for name, value in tags.items():
            if value is None:
                delattr(ds, name)
            else:
                setattr(ds, name, value)
        path = folder / file.format(len(hu) - k)
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
