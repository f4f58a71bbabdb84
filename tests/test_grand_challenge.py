from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastorgan.__main__ import main
from fastorgan.cascade import Cascade
from fastorgan.errors import VolumeError
from fastorgan.grand_challenge import image_folders

UID = "7c4d5f0e-2b1a-4d38-9c4f-0a5b6c7d8e9f"


def test_cts_are_taken_and_labels_put_where_the_platform_has_them(
    tmp_path: Path, blocks: Any, by_hu: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    monkeypatch.setattr(Cascade, "load", lambda *_, **__: by_hu)
    folder = tmp_path / "input" / "images" / "ct"
    folder.mkdir(parents=True)
    image, codes = blocks
    ct = sitk.GetImageFromArray(np.asarray(image.dataobj).transpose(2, 1, 0))
    ct.SetSpacing((5.0, 5.0, 5.0))
    # RAS+ on ITK's LPS axes.
    ct.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(ct, str(folder / f"{UID}.mha"), useCompression=True)
    arguments = [str(tmp_path / "input"), str(tmp_path / "output"), "--device", "cpu"]
    assert main(["predict", *arguments, "--grand-challenge", "abdominal-organs"]) == 0
    (written,) = (path for path in (tmp_path / "output").rglob("*") if path.is_file())
    assert written == tmp_path / "output" / "images" / "abdominal-organs" / f"{UID}.mha"
    labels = sitk.ReadImage(str(written))
    assert labels.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    assert labels.GetDirection() == ct.GetDirection()
    expected = by_hu.segment(image).get_fdata()
    assert np.array_equal(sitk.GetArrayFromImage(labels).transpose(2, 1, 0), expected)
    assert set(np.unique(expected)) == set(np.unique(codes))


def test_another_sockets_folder_is_taken_where_it_is_the_only_one(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "abdominal-ct").mkdir(parents=True)
    assert image_folders(tmp_path, Path("out"), "organs") == (images / "abdominal-ct", Path("out/images/organs"))
    (images / "ct").mkdir()
    assert image_folders(tmp_path, Path("out"), "organs")[0] == images / "ct"


def test_folders_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"images: cannot be read \(No such file or directory\)"):
        image_folders(tmp_path, Path("out"), "organs")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    with pytest.raises(VolumeError, match="holds neither ct/ nor one folder"):
        image_folders(tmp_path, Path("out"), "organs")


def test_one_input_folder_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "a", "b", str(tmp_path), "--grand-challenge", "organs"]) == 2
    assert "takes one input folder" in capsys.readouterr().err
