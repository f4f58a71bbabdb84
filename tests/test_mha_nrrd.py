"""`mha_nrrd` against SimpleITK, which reads and writes both formats, and against files that are damaged or lie."""

import random
import re
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from fastorgan.errors import VolumeError
from fastorgan.mha_nrrd import TEXT_HEADER_SUFFIXES, open_text_header
from fastorgan.volume import label_image, load_image, read_volume, save_image

sitk: Any = pytest.importorskip("SimpleITK")

LPS = np.diag([-1.0, -1.0, 1.0])

both = pytest.mark.parametrize("suffix", TEXT_HEADER_SUFFIXES)


def affine_of(image: Any) -> NDArray[np.float64]:
    """A SimpleITK image's affine to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = LPS @ np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = LPS @ image.GetOrigin()
    return affine


def written(path: Path, array: NDArray[Any], turn: NDArray[np.float64] | None = None, *, packed: bool = True) -> Any:
    """Write (x, y, z) values as SimpleITK does."""
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-11.5, 20.25, -300.0))
    image.SetDirection((np.eye(3) if turn is None else turn).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=packed)
    return image


def values(dtype: str = "i2") -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 100, (6, 7, 8)).astype(dtype)


@both
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_what_simpleitk_writes_is_read(tmp_path: Path, suffix: str, dtype: str, packed: bool) -> None:
    path = tmp_path / f"ct{suffix}"
    turn = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix()
    image = written(path, values(dtype), turn, packed=packed)
    read = load_image(path)
    assert np.array_equal(np.asarray(read.dataobj), values(dtype))
    assert np.asarray(read.dataobj).dtype == dtype
    assert np.allclose(read.affine, affine_of(image), atol=1e-5)
    assert (int(read.header["qform_code"]), int(read.header["sform_code"])) == (1, 1)
    assert read.get_filename() == str(path)


@both
@given(axes=st.permutations(range(3)), signs=st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_labels_lie_where_the_scan_does(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, axes: list[int], signs: tuple[int, ...]
) -> None:
    folder = tmp_path_factory.mktemp("turned")
    source, target = folder / f"ct{suffix}", folder / f"labels{suffix}"
    image = written(source, values(), np.eye(3)[axes] * signs)
    scan = load_image(source)
    volume = read_volume(scan, "test")
    assert np.array_equal(np.sort(volume.array, axis=None), np.sort(values(), axis=None))
    labels = (values() % 5).astype(np.uint8)
    save_image(label_image(labels, scan), target)
    back = sitk.ReadImage(str(target))
    assert np.array_equal(sitk.GetArrayFromImage(back).transpose(2, 1, 0), labels)
    assert back.GetPixelID() == sitk.sitkUInt8
    for of in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(back, of)() == pytest.approx(getattr(image, of)(), abs=1e-4), of
    assert np.allclose(load_image(target).affine, affine_of(back), atol=1e-5)


@both
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", ">i2", "i2", "u4", "i4", "f4", "f8"])
def test_simpleitk_reads_what_is_written(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"a{suffix}"
    save_image(nib.Nifti1Image(values(dtype), np.diag([1.0, 2.0, 3.0, 1.0])), path)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0), values(dtype))


@pytest.mark.parametrize("order", ["little", "big"])
def test_both_byte_orders_are_read(tmp_path: Path, order: str) -> None:
    array = values(">i2" if order == "big" else "<i2")
    meta = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\n"
        f"BinaryDataByteOrderMSB = {order == 'big'}\nElementSpacing = 1 2 3\nDimSize = 6 7 8\n"
        "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    nrrd = (
        "NRRD0005\n# made by hand\ntype: int16\ndimension: 3\nsizes: 6 7 8\nspacings: 1 2 3\n"
        f"endian: {order}\nkey:=value\nencoding: raw\n\n"
    )
    for suffix, text in ((".mha", meta), (".nrrd", nrrd)):
        path = tmp_path / f"ct{suffix}"
        path.write_bytes(text.encode() + array.tobytes("F"))
        image = open_text_header(path)
        assert np.array_equal(np.asarray(image.dataobj), values())
        assert sorted(np.linalg.norm(image.affine[:3, :3], axis=0)) == [1, 2, 3]
        # Neither tells directions.
        assert "says nothing of directions" in read_volume(image, "test").warnings[0]


def test_a_right_anterior_superior_space_is_as_nifti(tmp_path: Path) -> None:
    text = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 6 7 8\n"
        "space directions: (0,1,0) (-2,0,0) (0,0,3)\nspace origin: (4,5,6)\nendian: little\nencoding: raw\n\n"
    )
    path = tmp_path / "ct.nrrd"
    path.write_bytes(text.encode() + values().tobytes("F"))
    expected = [[0, -2, 0, 4], [1, 0, 0, 5], [0, 0, 3, 6], [0, 0, 0, 1]]
    assert load_image(path).affine.tolist() == expected


@both
def test_a_long_axis_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ct{suffix}"
    written(path, np.zeros((40000, 2, 2), np.int8))
    assert isinstance(load_image(path), nib.Nifti2Image)


# Files that are refused


def refused(path: Path, reason: str) -> None:
    with pytest.raises(VolumeError, match=rf"^{re.escape(str(path))}: .*{reason}.*\Z"):
        load_image(path)


@both
@pytest.mark.parametrize("packed", [True, False])
def test_a_cut_file_is_refused(tmp_path: Path, suffix: str, packed: bool) -> None:
    path = tmp_path / f"ct{suffix}"
    written(path, values(), packed=packed)
    whole = path.read_bytes()
    for size in (0, 3, 50, 300, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "")


@both
def test_a_flipped_bit_among_packed_voxels_is_refused(tmp_path: Path, suffix: str) -> None:
    # SimpleITK 2.5.7 takes all of these .mha, and hands on memory that was never written.
    path = tmp_path / f"ct{suffix}"
    written(path, np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20)).astype(np.int16))
    whole = path.read_bytes()
    # Behind the gzip header, whose time and name mean nothing.
    start = max(whole.index(b"LOCAL\n") + 6 if suffix == ".mha" else 0, whole.find(b"\n\n") + 12)
    numbers = random.Random(0)
    for _ in range(100):
        spoiled = bytearray(whole)
        spoiled[numbers.randrange(start, len(whole))] ^= 1 << numbers.randrange(8)
        path.write_bytes(spoiled)
        refused(path, "")


META = "ObjectType = Image\nNDims = 3\nElementSpacing = 1 1 1\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
NRRD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nspacings: 1 1 1\nencoding: raw\n"
LOCAL = "ElementDataFile = LOCAL\n"

LIES = {
    "mha: another file": ("a.mha", META + "ElementDataFile = ../../../etc/passwd\n", "in another file"),
    "mha: a list of files": ("a.mha", META + "ElementDataFile = LIST\n", "in another file"),
    "mha: four axes": ("a.mha", META.replace("NDims = 3", "NDims = 4") + LOCAL, "has 4 axes"),
    "mha: channels": ("a.mha", META + "ElementNumberOfChannels = 3\n" + LOCAL, "colours or vectors"),
    "mha: text": ("a.mha", META + "BinaryData = False\n" + LOCAL, "only binary voxels"),
    "mha: complex": ("a.mha", META.replace("UCHAR", "OTHER") + LOCAL, "one real number"),
    "mha: negative": ("a.mha", META.replace("2 2 2", "2 -2 2") + LOCAL, "three numbers of voxels"),
    "mha: no voxel": ("a.mha", META.replace("2 2 2", "2 0 2") + LOCAL, "three numbers of voxels"),
    "mha: 2 to the 31": ("a.mha", META.replace("2 2 2", "2147483648 2 2") + LOCAL, "more than 2147483648"),
    "mha: long": ("a.mha", META.replace("2 2 2", f"{'9' * 99} 2 2") + LOCAL, "three numbers of voxels"),
    "mha: spacing 0": ("a.mha", META.replace("1 1 1", "1 0 1") + LOCAL, "not positive"),
    "mha: spacing NaN": ("a.mha", META.replace("1 1 1", "1 nan 1") + LOCAL, "not positive"),
    "mha: spacing of two": ("a.mha", META.replace("1 1 1", "1 1") + LOCAL, "expected 3 numbers"),
    "mha: no numbers": ("a.mha", META.replace("1 1 1", "a b c") + LOCAL, "could not convert"),
    "mha: flat": ("a.mha", META + "TransformMatrix = 1 0 0 1 0 0 0 0 1\n" + LOCAL, "singular"),
    "mha: no end": ("a.mha", META + "Comment = " + "x" * 2_000_000, "has no end"),
    "mha: no text": ("a.mha", "\0\1\2\n" * 99, "not a MetaImage"),
    "mha: empty": ("a.mha", "", "has no end"),
    "nrrd: another file": ("a.nrrd", NRRD + "data file: /etc/passwd\n\n", "in another file"),
    "nrrd: another file, too": ("a.nrrd", NRRD + "DataFile: x.raw\n\n", "in another file"),
    "nrrd: bzip2": ("a.nrrd", NRRD.replace("raw", "bzip2") + "\n", "encoded as bzip2"),
    "nrrd: skipped bytes": ("a.nrrd", NRRD + "byte skip: -1\n\n", "not right behind the header"),
    "nrrd: block": ("a.nrrd", NRRD.replace("uint8", "block") + "\n", "one real number"),
    "nrrd: time": ("a.nrrd", NRRD + "space: 3D-right-handed\nspace directions: (1,0,0)(0,1,0)(0,0,1)\n\n", "the space"),
    "nrrd: vectors": ("a.nrrd", NRRD + "space: LPS\nspace directions: none (0,1,0) (0,0,1)\n\n", "expected 9 numbers"),
    "nrrd: two axes": ("a.nrrd", NRRD.replace("dimension: 3", "dimension: 2") + "\n", "has 2 axes"),
    "nrrd: of another kind": ("a.nrrd", META + LOCAL, "not an NRRD file"),
}


@pytest.mark.parametrize(("name", "text", "reason"), LIES.values(), ids=LIES.keys())
def test_headers_that_lie_are_refused_in_one_line(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_bytes(text.encode() + bytes(8))
    refused(tmp_path / name, reason)


def test_the_headers_above_are_good_but_for_their_lies(tmp_path: Path) -> None:
    for name, text in (("a.mha", META + LOCAL), ("a.nrrd", NRRD + "\n")):
        (tmp_path / name).write_bytes(text.encode() + bytes(8))
        assert load_image(tmp_path / name).shape == (2, 2, 2)


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    press = zlib.compressobj(9)
    bomb = b"".join(press.compress(bytes(1 << 20)) for _ in range(300)) + press.flush()
    path = tmp_path / "a.mha"
    path.write_bytes((META + "CompressedData = True\n" + LOCAL).encode() + bomb)
    refused(path, "more voxels than the header claims")
    path.write_bytes((META.replace("2 2 2", "999 999 999") + "CompressedData = True\n" + LOCAL).encode() + bomb)
    refused(path, "cut short: expected 997002999 bytes")


def test_max_voxels_counts_here_too(tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    path.write_bytes((META + LOCAL).encode() + bytes(8))
    load_image(path, max_voxels=8)
    with pytest.raises(VolumeError, match="2 x 2 x 2 voxels are more than 7"):
        load_image(path, max_voxels=7)
