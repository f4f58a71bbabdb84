"""Names and colours of the labels in the forms that other programs read: 3D Slicer, ITK-SNAP, and NIfTI itself."""

from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

import nibabel as nib

from .errors import VolumeError
from .files import whole_file
from .labels import ORGANS, Organ

SLICER_NAME, ITK_SNAP_NAME = "fastorgan.ctbl", "fastorgan.label"
"""Names of the two files that `write_tables` writes."""

BY_CODE: Mapping[int, Organ] = {organ.code: organ for organ in ORGANS}

_ITK_SNAP_HEAD = """\
################################################
# ITK-SnAP Label Description File
# Columns: index, red, green, blue (0 to 255), opacity (0 to 1), shown, shown as a mesh, name
################################################
"""


def slicer_table() -> str:
    """The labels as a 3D Slicer colour table (.ctbl): code, name, red, green, blue and opacity, 0 to 255."""
    rows = ["0 background 0 0 0 0", *(f"{organ.code} {organ.name} {_spaced(organ)} 255" for organ in ORGANS)]
    return "\n".join(["# Color table file fastorgan", f"# {len(rows)} values", *rows, ""])


def itk_snap_table() -> str:
    """The labels as an ITK-SNAP label description file."""
    rows = ['0 0 0 0 0 0 0 "Clear Label"', *(f'{organ.code} {_spaced(organ)} 1 1 1 "{organ.name}"' for organ in ORGANS)]
    return _ITK_SNAP_HEAD + "\n".join([*rows, ""])


def write_tables(folder: Path) -> None:
    """Write both tables into a folder, each whole or not at all.

    Raises:
        VolumeError: the folder cannot be written to.
    """
    for name, text in ((SLICER_NAME, slicer_table()), (ITK_SNAP_NAME, itk_snap_table())):
        path = folder / name
        try:
            with whole_file(path, path.suffix) as partial:
                partial.write_text(text, encoding="ascii")
        except OSError as error:
            raise VolumeError(f"{path}: cannot be written ({error.strerror or error})") from error


def names_extension(organs: Mapping[int, Organ] = BY_CODE) -> nib.nifti1.Nifti1Extension:
    """A NIfTI header extension with the labels' names and colours, as TotalSegmentator writes it.

    That is the label table of the Caret program, in XML, under the extension code 0
    (`totalsegmentator/nifti_ext_header.py`).

    Args:
        organs: by their code in the file.
    """
    rows = "".join(
        f'<Label Key="{code}" {_shares(organ)} Alpha="1">{escape(organ.name)}</Label>\n'
        for code, organ in organs.items()
    )
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<CaretExtension><VolumeInformation Index="0"><LabelTable>\n'
        f"{rows}</LabelTable><StudyMetaDataLinkSet></StudyMetaDataLinkSet><VolumeType>Label</VolumeType>"
        "</VolumeInformation></CaretExtension>\n"
    ).encode()
    # An extension, with the 8 bytes of its size and code, fills multiples of 16 bytes: spaces are XML, zeros are not.
    return nib.nifti1.Nifti1Extension(0, text + b" " * (-(len(text) + 8) % 16))


def _spaced(organ: Organ) -> str:
    return " ".join(map(str, organ.colour))


def _shares(organ: Organ) -> str:
    parts = zip(("Red", "Green", "Blue"), organ.colour, strict=True)
    return " ".join(f'{name}="{value / 255:.6g}"' for name, value in parts)
