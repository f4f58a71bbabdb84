"""Headers that lie; `test_volume.py` has the honest ones and those that are merely wrong."""

import gzip
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan import memory
from fastorgan.errors import VolumeError
from fastorgan.nifti import form_warnings
from fastorgan.volume import label_image, load_image, read_volume, save_image

AFFINE = np.diag([0.75, 1.5, 5.0, 1.0])


def content(
    array: NDArray[Any] | None = None, affine: NDArray[np.float64] = AFFINE, kind: Any = nib.Nifti1Image
) -> bytearray:
    """The bytes of a good .nii file."""
    return bytearray(kind(np.zeros((3, 4, 5), np.int16) if array is None else array, affine).to_bytes())


def refused(path: Path, reason: str) -> None:
    with pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: .*{reason}.*\Z"):
        read_volume(load_image(path), str(path))


def test_an_axis_of_2_to_the_31_is_refused(tmp_path: Path) -> None:
    raw = content(kind=nib.Nifti2Image)
    for axes in ((2**31, 4, 5), (2**31, 2**31, 2**31), (2**62, 2**62, 2**62), (3, 4, 2**40)):
        struct.pack_into("<8q", raw, 16, 3, *axes, 1, 1, 1, 1)
        (tmp_path / "a.nii").write_bytes(raw)
        refused(tmp_path / "a.nii", "voxels are more than 2147483648; --max-voxels allows others")


def test_a_negative_axis_is_refused(tmp_path: Path) -> None:
    raw = content(kind=nib.Nifti2Image)
    struct.pack_into("<8q", raw, 16, 3, -3, -4, 5, 1, 1, 1, 1)
    (tmp_path / "a.nii").write_bytes(raw)
    refused(tmp_path / "a.nii", "axis of -4 voxels")


def test_max_voxels_is_the_users_to_set(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(content())
    load_image(path, max_voxels=60)
    with pytest.raises(VolumeError, match="3 x 4 x 5 voxels are more than 59; --max-voxels"):
        load_image(path, max_voxels=59)


def test_what_memory_cannot_hold_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(content())
    # Two bytes a voxel and one for its label.
    monkeypatch.setattr(memory, "available_bytes", lambda: 180)
    load_image(path)
    monkeypatch.setattr(memory, "available_bytes", lambda: 179)
    monkeypatch.setattr(nib.Nifti1Image, "ImageArrayProxy", None)
    with pytest.raises(VolumeError, match="3 x 4 x 5 voxels need 0 MiB of memory"):
        load_image(path)


def test_a_sparse_file_of_a_terabyte_is_refused(tmp_path: Path) -> None:
    raw = content()
    struct.pack_into("<8h", raw, 40, 3, 10000, 10000, 10000, 1, 1, 1, 1)
    path = tmp_path / "a.nii"
    path.write_bytes(raw)
    with path.open("r+b") as file:
        file.truncate(2 * 10**12)
    refused(path, "more than")


def test_a_gz_file_cannot_claim_more_than_gzip_can_pack(tmp_path: Path) -> None:
    raw = content()
    struct.pack_into("<8h", raw, 40, 3, 1000, 1000, 1000, 1, 1, 1, 1)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(raw))
    refused(path, "cut short: its header claims 2000000352 bytes")


def zeros(megabytes: int) -> bytes:
    """A gzip stream of zeros, as good as deflate can press them."""
    press = zlib.compressobj(9, wbits=31)
    block = bytes(1 << 20)
    return b"".join(press.compress(block) for _ in range(megabytes)) + press.flush()


def test_a_bomb_behind_the_last_voxel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content()) + zeros(300))
    assert path.stat().st_size < 1 << 20
    refused(path, "goes on long after its last voxel")


def test_a_bomb_before_the_first_voxel_is_refused(tmp_path: Path) -> None:
    raw = content()
    struct.pack_into("<f", raw, 108, 2e9)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(raw) + zeros(300))
    refused(path, "said to begin 2000000000 bytes into it")


def test_extensions_are_not_read(tmp_path: Path) -> None:
    # Of a size that is a lie, and of the kind that nibabel hands to a parser of DICOM.
    for size, code in ((0, 2), (-16, 6), (2**31 - 16, 4), (32, 2)):
        raw = content()
        raw[348:352] = b"\1\0\0\0"
        struct.pack_into("<f", raw, 108, 384.0)
        extension = struct.pack("<2i", size, code) + b"\xff" * 24
        path = tmp_path / "a.nii"
        path.write_bytes(raw[:352] + extension + raw[352:])
        assert read_volume(load_image(path), str(path)).shape == (5, 4, 3)


def test_cifti_is_not_parsed(tmp_path: Path) -> None:
    # Its header is in XML, which can be a bomb of its own.
    raw = content(kind=nib.Nifti2Image)
    struct.pack_into("<i", raw, 504, 3001)
    raw[540:544] = b"\1\0\0\0"
    text = b"<?xml version='1.0'?><CIFTI>" + b" " * 4 + b"</CIFTI>"
    struct.pack_into("<q", raw, 168, 544 + 8 + len(text))
    (tmp_path / "a.nii").write_bytes(raw[:544] + struct.pack("<2i", 8 + len(text), 32) + text + raw[544:])
    assert read_volume(load_image(tmp_path / "a.nii"), "a").shape == (5, 4, 3)


@pytest.mark.parametrize(
    ("scale", "reason"), [(1e-3, "are no CT's"), (1e3, "are no CT's"), (1e-20, "are no CT's"), (1e18, "are no CT's")]
)
def test_voxels_in_other_units_are_refused(tmp_path: Path, scale: float, reason: str) -> None:
    affine = AFFINE.copy()
    affine[:3] *= scale
    (tmp_path / "a.nii").write_bytes(content(affine=affine))
    refused(tmp_path / "a.nii", reason)


def sheared(path: Path, shape: tuple[int, int, int]) -> None:
    affine = np.diag([0.05, 0.05, 70.0, 1.0])
    affine[0, 2] = 70.0
    path.write_bytes(content(np.zeros(shape, np.int8), affine))


def test_a_shear_that_would_make_a_small_file_huge_is_refused(tmp_path: Path) -> None:
    sheared(tmp_path / "a.nii", (60, 60, 500))
    refused(tmp_path / "a.nii", "so skewed that upright it would have 354 x 60 x 698660 voxels; resample it")


def test_a_shear_that_would_fill_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheared(tmp_path / "a.nii", (60, 60, 12))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    refused(tmp_path / "a.nii", "voxels set upright need .* MiB of memory")


def test_a_single_slice_may_be_steep(tmp_path: Path) -> None:
    affine = np.diag([0.8, 0.8, 5.0, 1.0])
    c = np.sqrt(0.5)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -c], [0, c, c]]) @ affine[:3, :3]
    (tmp_path / "a.nii").write_bytes(content(np.zeros((512, 512, 1), np.int16), affine))
    assert read_volume(load_image(tmp_path / "a.nii"), "a").grid.upright is not None


def test_a_file_that_shrinks_while_it_is_worked_on_harms_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    array = np.arange(64**3, dtype=np.int32).reshape(64, 64, 64)
    path.write_bytes(content(array))
    volume = read_volume(load_image(path), str(path))
    path.write_bytes(b"")
    # Mapped, this would be a bus error.
    assert int(volume.array.max()) == 64**3 - 1


# Two files


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("named", ["ct.hdr", "ct.img"])
def test_a_pair_is_read_and_its_labels_are_one_file(tmp_path: Path, kind: Any, order: str, named: str) -> None:
    array = np.arange(60).reshape(3, 4, 5).astype(f"{order}i2")
    header = kind.header_class(endianness=order)
    header.set_data_dtype(array.dtype)
    header.set_qform(AFFINE, 1)
    header.set_sform(AFFINE, 3)
    nib.save(kind(array, AFFINE, header), tmp_path / "ct.hdr")
    image = load_image(tmp_path / named)
    volume = read_volume(image, named)
    assert np.array_equal(volume.array, array.transpose(2, 1, 0))
    labels = np.ones((3, 4, 5), np.uint8)
    save_image(label_image(labels, image), tmp_path / "labels.nii.gz")
    written: Any = nib.load(tmp_path / "labels.nii.gz")
    assert isinstance(written, nib.Nifti1Image)
    assert np.array_equal(written.affine, AFFINE)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 3)
    assert np.array_equal(np.asarray(written.dataobj), labels)


@pytest.mark.parametrize("gone", [".hdr", ".img"])
def test_half_a_pair_is_refused(tmp_path: Path, gone: str) -> None:
    nib.save(nib.Nifti1Pair(np.zeros((3, 4, 5), np.int16), AFFINE), tmp_path / "ct.hdr")
    (tmp_path / f"ct{gone}").unlink()
    left = ".img" if gone == ".hdr" else ".hdr"
    refused(tmp_path / f"ct{left}", r"ct\.hdr and ct\.img belong together; one of them is missing")


def test_analyze_is_refused(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(np.zeros((3, 4, 5), np.int16), AFFINE), tmp_path / "ct.hdr")
    refused(tmp_path / "ct.hdr", "does not tell left from right")


# Two matrices


def header_of(qform: NDArray[np.float64] | None, sform: NDArray[np.float64] | None) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_shape((3, 4, 5))
    header.set_qform(AFFINE if qform is None else qform, 0 if qform is None else 1)
    header.set_sform(AFFINE if sform is None else sform, 0 if sform is None else 1)
    return header


def test_forms_that_agree_are_not_spoken_of() -> None:
    moved = AFFINE.copy()
    moved[:3, 3] = 7
    for forms in ((AFFINE, AFFINE), (AFFINE, None), (None, AFFINE), (AFFINE, moved)):
        assert form_warnings(header_of(*forms)) == []
    assert form_warnings(nib.MGHImage(np.zeros((3, 4, 5), np.int16), AFFINE).header) == []


def test_forms_that_differ_are_said(tmp_path: Path) -> None:
    mirrored = AFFINE @ np.diag([-1.0, 1, 1, 1])
    stretched = AFFINE @ np.diag([1.0, 1, 1.2, 1])
    for other in (mirrored, stretched):
        assert form_warnings(header_of(AFFINE, other)) == [
            "qform and sform differ in directions or voxel sizes; the sform was used"
        ]
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), None, header_of(AFFINE, mirrored))
    nib.save(image, tmp_path / "a.nii")
    assert "qform and sform differ" in read_volume(load_image(tmp_path / "a.nii"), "a").warnings[0]


def test_no_form_is_said() -> None:
    assert form_warnings(header_of(None, None)) == [
        "the header says nothing of directions (qform and sform are 0): left and right may be exchanged"
    ]
