"""MetaImage (.mha) and NRRD (.nrrd): a text header, and the voxels behind it in the same file.

Read here and not by SimpleITK, which takes a .mha whose packed voxels are damaged, and hands on whatever memory holds
(2.5.7). Formats: the documentation of MetaIO (ITK) and of the NRRD format (Teem), version 5.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .errors import VolumeError
from .nifti import MAX_VOXELS, check_affine, check_size

TEXT_HEADER_SUFFIXES = (".mha", ".nrrd")

_HEADER_BYTES = 1 << 20  # an honest header has a few hundred
_CHUNK = 1 << 20
_ZLIB_OR_GZIP = 47  # zlib's wbits for either, told by the first bytes

_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0])

_META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}

_NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}

_NRRD_SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), _RAS_FROM_LPS),
    **dict.fromkeys(("right-anterior-superior", "ras", "scanner-xyz"), np.eye(3)),
    **dict.fromkeys(("left-anterior-superior", "las"), np.diag([-1.0, 1.0, 1.0])),
}


class _HeaderError(ValueError):
    """A field is missing or not understood."""


@dataclass(frozen=True)
class _Header:
    """What a text header says.

    Attributes:
        shape: voxels along x, y, z as stored, the first fastest.
        dtype: with its byte order.
        axes: (3, 3), columns the step of one voxel along each axis in RAS mm.
        origin: centre of the first voxel in RAS mm.
        packed: whether the voxels are a zlib or gzip stream.
        oriented: whether the file tells directions at all.
    """

    shape: tuple[int, int, int]
    dtype: "np.dtype[Any]"
    axes: NDArray[np.float64]
    origin: NDArray[np.float64]
    packed: bool
    oriented: bool


def open_text_header(path: Path, max_voxels: int = MAX_VOXELS) -> nib.Nifti1Image:
    """Read a .mha or .nrrd file.

    Args:
        path: the file, which must hold its voxels itself: a name of another file is not followed.
        max_voxels: more are refused.

    Returns:
        The image in memory, as a NIfTI file of the same geometry would be; the codes of its qform and sform are 1
        (scanner), or 0 where the file tells no directions.

    Raises:
        VolumeError: if the file is no such volume, damaged, cut short or too large.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        try:
            # Infinity and NaN are refused as an affine; NumPy's warnings would come on top, without the file's name.
            with np.errstate(all="ignore"):
                header = (_read_meta if path.suffix == ".mha" else _read_nrrd)(file)
            affine = np.eye(4)
            affine[:3, :3], affine[:3, 3] = header.axes, header.origin
            check_affine(affine, path)
            check_size(header.shape, header.dtype, path, max_voxels)
            array = _voxels(file, header)
        except (ValueError, OverflowError, zlib.error) as error:
            raise VolumeError(f"{path}: damaged or not understood ({' '.join(str(error).split())})") from error
        except MemoryError as error:
            size = " x ".join(map(str, header.shape))
            raise VolumeError(f"{path}: {size} voxels cannot be read into this machine's memory") from error
    kind: Any = nib.Nifti1Image if max(header.shape) < 1 << 15 else nib.Nifti2Image
    image: nib.Nifti1Image = kind(array, affine, dtype=array.dtype, file_map={"image": nib.FileHolder(str(path))})
    image.header.set_sform(affine, int(header.oriented))
    image.header.set_qform(affine, int(header.oriented))
    image.header.set_xyzt_units("mm")
    return image


def write_text_header(image: nib.Nifti1Image, path: Path, named: str) -> None:
    """Write an image in memory as .mha or .nrrd, packed.

    Args:
        image: integers of up to 32 bits or floats; axes of length 1 behind the third are dropped.
        path: the file to write.
        named: the suffix that chooses the format.

    Raises:
        OSError: if it cannot be written.
    """
    values = np.asanyarray(image.dataobj)
    values = values.reshape(values.shape[:3])
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    code = values.dtype.str[1:]
    axes = _RAS_FROM_LPS @ np.asarray(image.affine, float)[:3, :3]
    origin = _RAS_FROM_LPS @ np.asarray(image.affine, float)[:3, 3]
    spacing = np.linalg.norm(axes, axis=0)
    if named == ".mha":
        packed = zlib.compress(values.tobytes("F"), 1)
        lines = {
            "ObjectType": "Image",
            "NDims": "3",
            "BinaryData": "True",
            "BinaryDataByteOrderMSB": "False",
            "CompressedData": "True",
            "CompressedDataSize": str(len(packed)),
            "TransformMatrix": _numbers((axes / spacing).T.ravel()),
            "Offset": _numbers(origin),
            "ElementSpacing": _numbers(spacing),
            "DimSize": _numbers(values.shape),
            "ElementType": next(name for name, of in _META_TYPES.items() if of == code),
            "ElementDataFile": "LOCAL",
        }
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
    else:
        press = zlib.compressobj(1, wbits=31)
        packed = press.compress(values.tobytes("F")) + press.flush()
        lines = {
            "type": next(name for name, of in _NRRD_TYPES.items() if of == code),
            "dimension": "3",
            "space": "left-posterior-superior",
            "sizes": _numbers(values.shape),
            "space directions": " ".join(f"({_numbers(step, ',')})" for step in axes.T),
            "kinds": "domain domain domain",
            "endian": "little",
            "encoding": "gzip",
            "space origin": f"({_numbers(origin, ',')})",
        }
        text = "NRRD0004\n" + "".join(f"{key}: {value}\n" for key, value in lines.items()) + "\n"
    path.write_bytes(text.encode("ascii") + packed)


def _numbers(values: Any, between: str = " ") -> str:
    return between.join(str(value) if isinstance(value, int) else repr(float(value)) for value in values)


def _lines(file: IO[bytes]) -> "Callable[[], str]":
    """Read a header line by line, none without end."""
    left = _HEADER_BYTES

    def line() -> str:
        nonlocal left
        raw = file.readline(left)
        left -= len(raw)
        if not raw.endswith(b"\n"):
            raise _HeaderError("the header has no end")
        return raw.decode("utf-8", "replace").rstrip("\r\n")

    return line


def _read_meta(file: IO[bytes]) -> _Header:
    line, fields = _lines(file), dict[str, str]()
    while "elementdatafile" not in fields:
        key, equals, value = line().partition("=")
        if not equals:
            raise _HeaderError("not a MetaImage file")
        fields[key.strip().lower()] = value.strip()
    if fields["elementdatafile"] != "LOCAL":
        raise _HeaderError("its voxels are in another file")
    if fields.get("ndims") != "3":
        raise _HeaderError(f"has {fields.get('ndims', 'unknown')} axes; a CT volume has 3")
    if fields.get("elementnumberofchannels", "1") != "1":
        raise _HeaderError("holds colours or vectors; a CT volume has one number per voxel")
    if fields.get("binarydata", "True").lower() != "true" or fields.get("headersize", "0") not in ("0", "-1"):
        raise _HeaderError("only binary voxels right behind the header are read")
    big = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", "False")).lower() == "true"
    turn = next((fields[key] for key in ("transformmatrix", "rotation", "orientation") if key in fields), None)
    rows = np.eye(3) if turn is None else _floats(turn, 9).reshape(3, 3)
    origin = next((fields[key] for key in ("offset", "position", "origin") if key in fields), "0 0 0")
    spacing = fields.get("elementspacing", fields.get("elementsize"))
    if spacing is None:
        raise _HeaderError("has no ElementSpacing")
    return _Header(
        _shape(fields.get("dimsize", "")),
        _dtype(_META_TYPES.get(fields.get("elementtype", "")), big),
        # A row of the matrix is the direction of an axis.
        _RAS_FROM_LPS @ rows.T @ np.diag(_positive(_floats(spacing, 3))),
        _RAS_FROM_LPS @ _floats(origin, 3),
        fields.get("compresseddata", "False").lower() == "true",
        turn is not None,
    )


def _read_nrrd(file: IO[bytes]) -> _Header:
    line, fields = _lines(file), dict[str, str]()
    if not line().startswith("NRRD000"):
        raise _HeaderError("not an NRRD file")
    while text := line():
        if not text.startswith("#") and ":=" not in text:
            key, _, value = text.partition(":")
            fields[key.strip().lower()] = value.strip()
    if fields.keys() & {"data file", "datafile"}:
        raise _HeaderError("its voxels are in another file")
    if fields.get("dimension") != "3":
        raise _HeaderError(f"has {fields.get('dimension', 'unknown')} axes; a CT volume has 3")
    encoding = fields.get("encoding", "").lower()
    skips = [fields.get(key, "0") for key in ("line skip", "lineskip", "byte skip", "byteskip")]
    if encoding not in ("raw", "gzip", "gz") or any(skip != "0" for skip in skips):
        raise _HeaderError(f"voxels encoded as {encoding or 'unknown'}, or not right behind the header, are not read")
    place = _NRRD_SPACES.get(fields.get("space", "").lower())
    if "space directions" in fields:
        if place is None:
            raise _HeaderError(f"the space {fields.get('space', 'unknown')} is not understood")
        axes = place @ _floats(fields["space directions"], 9).reshape(3, 3).T
        origin = place @ _floats(fields.get("space origin", "0 0 0"), 3)
    else:
        axes, origin = np.diag(_positive(_floats(fields.get("spacings", ""), 3))), np.zeros(3)
    return _Header(
        _shape(fields.get("sizes", "")),
        _dtype(_NRRD_TYPES.get(fields.get("type", "").lower()), fields.get("endian", "little").lower() == "big"),
        axes,
        origin,
        encoding != "raw",
        "space directions" in fields,
    )


def _floats(text: str, count: int) -> NDArray[np.float64]:
    words = re.sub(r"[(),]", " ", text).split()
    if len(words) != count:
        raise _HeaderError(f"expected {count} numbers, got {text!r}")
    return np.array([float(word) for word in words])


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if not (values > 0).all():
        raise _HeaderError(f"voxel size {' x '.join(f'{v:g}' for v in values)} mm is not positive")
    return values


def _shape(text: str) -> tuple[int, int, int]:
    words = text.split()
    if len(words) != 3 or not all(re.fullmatch(r"\d{1,18}", word) for word in words) or "0" in words:
        raise _HeaderError(f"expected three numbers of voxels, got {text!r}")
    x, y, z = (int(word) for word in words)
    return x, y, z


def _dtype(name: str | None, big: bool) -> "np.dtype[Any]":
    if name is None:
        raise _HeaderError("the type of its voxels is not understood; a CT volume has one real number per voxel")
    return np.dtype(name).newbyteorder(">" if big else "<")


def _voxels(file: IO[bytes], header: _Header) -> NDArray[Any]:
    """Read all voxels, and packed ones to the end of their stream, where the checksum lies."""
    needed = math.prod(header.shape) * header.dtype.itemsize
    here = file.tell()
    left = file.seek(0, 2) - here
    file.seek(here)
    if left * (1032 if header.packed else 1) < needed:
        raise _cut_short(needed, left)
    stored: NDArray[Any] = np.empty(header.shape, header.dtype, order="F")
    room = stored.reshape(-1, order="F").view(np.uint8).data
    filled = 0
    if not header.packed:
        while filled < needed:
            count = file.readinto(room[filled : filled + _CHUNK])  # type: ignore[attr-defined]
            if not count:
                raise _cut_short(needed, filled)
            filled += count
        return stored
    unpack = zlib.decompressobj(_ZLIB_OR_GZIP)
    while not unpack.eof:
        given = unpack.unconsumed_tail or file.read(_CHUNK)
        if not given:
            raise _cut_short(needed, filled)
        part = unpack.decompress(given, _CHUNK)
        if filled + len(part) > needed:
            raise ValueError("there are more voxels than the header claims")
        room[filled : filled + len(part)] = part
        filled += len(part)
    if filled < needed:
        raise _cut_short(needed, filled)
    return stored


def _cut_short(needed: int, there: int) -> ValueError:
    return ValueError(f"cut short: expected {needed} bytes of voxels, got {there}")
