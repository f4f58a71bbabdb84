"""Organ labels as a DICOM Segmentation object that refers to the CT's slices; needs highdicom, of the extra `dicom`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .dicom import DicomError, Series, read_datasets
from .errors import VolumeError
from .files import whole_file
from .labels import ORGANS

SNOMED = {"liver": "10200004", "kidney": "64033007", "spleen": "78961009", "pancreas": "15776009"}
"""SNOMED CT code by organ name; `kidney` is both kidneys."""

SERIES_NUMBER = 1000
"""Added to the CT's series number for the segmentation's own."""

_TYPE_TWO = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)
"""Attributes that must be there but may be empty; de-identification often takes them out."""


def save_segmentation(labels: NDArray[np.uint8], series: Series, path: Path) -> list[str]:
    """Write one binary segment for each organ that was found; frames without any of it are left out.

    Args:
        labels: organ codes on the grid of `series.load()`.
        series: the CT; slices that were missing have no frame.
        path: the file to write, whole or not at all.

    Returns:
        What a user should know, one line each; without any organ no file is written.

    Raises:
        DicomError: if highdicom is not installed.
        VolumeError: if a slice's header cannot be used, or the file cannot be written.
    """
    frames = labels.transpose(2, 1, 0)[series.places()]
    present = [organ for organ in ORGANS if (frames == organ.code).any()]
    if not present:
        return ["no organ was found, so no DICOM SEG was written"]
    try:
        import highdicom as hd
        from pydicom.sr.codedict import codes
        from pydicom.sr.coding import Code
    except ImportError as error:
        raise DicomError("DICOM SEG needs highdicom: pip install 'fastorgan[dicom]'") from error
    sources = read_datasets(series)
    for source in sources:
        for name in _TYPE_TWO:
            if name not in source:
                setattr(source, name, "")
    algorithm = hd.AlgorithmIdentificationSequence(
        "fastorgan", codes.DCM.ArtificialIntelligence, __version__, source="fastorgan"
    )
    segments = [
        hd.seg.SegmentDescription(
            number,
            organ.name.capitalize(),
            codes.SCT.AnatomicalStructure,
            Code(SNOMED[organ.name], "SCT", organ.name.capitalize()),
            hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm,
            display_color=hd.color.CIELabColor.from_rgb(*organ.colour),
        )
        for number, organ in enumerate(present, 1)
    ]
    # Segments are numbered from 1 without a gap.
    number_of = np.zeros(256, np.uint8)
    number_of[[organ.code for organ in present]] = range(1, len(present) + 1)
    try:
        segmentation = hd.seg.Segmentation(
            sources,
            number_of[frames],
            hd.seg.SegmentationTypeValues.BINARY,
            segments,
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBER + (series.slices[0].number or 0),
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="fastorgan",
            manufacturer_model_name="fastorgan",
            software_versions=__version__,
            device_serial_number="none",
            content_label="ORGANS",
            content_description="Abdominal organs; not for diagnosis",
        )
        segmentation.SeriesDescription = "fastorgan organs"
        with whole_file(path, ".dcm") as partial:
            segmentation.save_as(partial)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be written ({error.strerror or error})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # What highdicom finds missing or wrong in the slices' headers.
        text = " ".join(str(error).split())
        raise VolumeError(f"{series.folder}: no DICOM SEG can be made of this series ({text})") from error
    return []
