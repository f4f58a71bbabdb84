"""The tables are read back by rules written down here anew, as the other programs have them."""

import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest

from fastorgan.errors import VolumeError
from fastorgan.label_tables import (
    ITK_SNAP_NAME,
    SLICER_NAME,
    itk_snap_table,
    names_extension,
    slicer_table,
    write_tables,
)
from fastorgan.labels import ORGANS, Organ
from fastorgan.volume import label_image, save_image

NAMES = {1: "liver", 2: "kidney", 3: "spleen", 4: "pancreas"}
LIVER_RGB = (216, 101, 79)


def test_slicers_table_has_a_header_and_six_columns() -> None:
    # https://slicer.readthedocs.io/en/latest/developer_guide/modules/colors.html
    lines = slicer_table().splitlines()
    assert lines[0].startswith("# Color table file")
    rows = [line.split(" ") for line in lines if not line.startswith("#")]
    assert lines[1] == f"# {len(rows)} values"
    assert all(len(row) == 6 for row in rows)
    assert rows[0] == ["0", "background", "0", "0", "0", "0"]
    assert {int(row[0]): row[1] for row in rows[1:]} == NAMES
    assert tuple(map(int, rows[1][2:])) == (*LIVER_RGB, 255)


def test_itk_snaps_table_has_eight_columns_with_quoted_names() -> None:
    rows = [shlex.split(line) for line in itk_snap_table().splitlines() if not line.startswith("#")]
    assert all(len(row) == 8 for row in rows)
    assert rows[0] == ["0", "0", "0", "0", "0", "0", "0", "Clear Label"]
    assert {int(row[0]): row[7] for row in rows[1:]} == NAMES
    assert rows[1][1:7] == [*map(str, LIVER_RGB), "1", "1", "1"]


def test_both_are_written_whole_into_a_folder(tmp_path: Path) -> None:
    write_tables(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([SLICER_NAME, ITK_SNAP_NAME])
    assert (tmp_path / SLICER_NAME).read_text() == slicer_table()
    assert (tmp_path / ITK_SNAP_NAME).read_text() == itk_snap_table()
    with pytest.raises(VolumeError, match=r"none/fastorgan\.ctbl: cannot be written"):
        write_tables(tmp_path / "none")


def names_in(image: Any) -> dict[int, str]:
    """What TotalSegmentator's `load_multilabel_nifti` takes from a file: the first extension's label table."""
    tree = ElementTree.fromstring(image.header.extensions[0].get_content())
    assert tree.tag == "CaretExtension"
    return {int(label.attrib["Key"]): str(label.text) for label in tree.findall("VolumeInformation/LabelTable/Label")}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_label_files_carry_their_names(tmp_path: Path, suffix: str, kind: Any) -> None:
    ct = kind(np.zeros((3, 4, 5), np.int16), np.eye(4))
    codes = np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 5
    path = tmp_path / f"labels{suffix}"
    save_image(label_image(codes, ct), path)
    read: Any = nib.load(path)
    assert names_in(read) == NAMES
    assert np.array_equal(np.asarray(read.dataobj), codes)


def test_the_extension_fills_its_blocks_without_zeros_and_has_the_colours() -> None:
    extension = names_extension({7: ORGANS[0]})
    content = extension.get_content()
    assert (len(content) + 8) % 16 == 0
    assert b"\0" not in content
    label = ElementTree.fromstring(content).find("VolumeInformation/LabelTable/Label")
    assert label is not None
    assert label.attrib["Key"] == "7"
    rgb = tuple(round(255 * float(label.attrib[name])) for name in ("Red", "Green", "Blue"))
    assert rgb == LIVER_RGB


def test_a_name_cannot_break_the_xml() -> None:
    content = names_extension({1: Organ(1, "a<b & ]]>", 1, (0, 0, 0))}).get_content()
    label = ElementTree.fromstring(content).find("VolumeInformation/LabelTable/Label")
    assert label is not None
    assert label.text == "a<b & ]]>"
