import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastorgan import weights as module
from fastorgan.errors import WeightsError
from fastorgan.weights import MANIFEST, Weights

ROI_XML = b"<net name='roi'/>"
ORGANS_BIN = bytes(range(256))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of weights of two files."""
    manifest = {
        "version": "1.2",
        "networks": {
            "roi": {"variant": "slim", "sha256": {"roi.xml": digest(ROI_XML)}},
            "organs": {"variant": "paper", "sha256": {"organs.bin": digest(ORGANS_BIN)}},
        },
    }
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "roi.xml").write_bytes(ROI_XML)
    (tmp_path / "organs.bin").write_bytes(ORGANS_BIN)
    return tmp_path


def refused(path: Path) -> Any:
    """Expect one line that names `path`."""
    return pytest.raises(WeightsError, match=rf"^{re.escape(str(path))}: .*\Z")


def test_files_are_read_and_described(folder: Path) -> None:
    weights = Weights.find(folder)
    assert weights.version == "1.2"
    assert weights.variant("roi") == "slim"
    assert weights.variant("organs") == "paper"
    assert weights.sha256 == {"roi.xml": digest(ROI_XML), "organs.bin": digest(ORGANS_BIN)}
    assert weights.read("roi", ".xml") == ROI_XML
    assert weights.holds("roi", ".xml")
    assert not weights.holds("roi", "-int8.xml")
    assert not weights.holds("spine", ".xml")
    assert weights.read("organs", ".bin") == ORGANS_BIN


def test_a_changed_file_is_refused(folder: Path) -> None:
    (folder / "roi.xml").write_bytes(ROI_XML + b"\n")
    with refused(folder / "roi.xml") as caught:
        Weights.find(folder).read("roi", ".xml")
    assert digest(ROI_XML)[:12] in str(caught.value)
    assert digest(ROI_XML + b"\n")[:12] in str(caught.value)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "organs.bin").unlink()
    with refused(folder / "organs.bin"):
        Weights.find(folder).read("organs", ".bin")


def test_a_file_without_a_digest_is_refused(folder: Path) -> None:
    (folder / "organs.xml").write_bytes(b"<net/>")
    with refused(folder / "organs.xml"):
        Weights.find(folder).read("organs", ".xml")


def test_a_network_that_the_manifest_lacks_is_named(folder: Path) -> None:
    weights = Weights.find(folder)
    with refused(folder / "heart.xml"):
        weights.read("heart", ".xml")
    with refused(folder / MANIFEST):
        weights.variant("heart")


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path / MANIFEST):
        Weights.find(tmp_path)
    with refused(tmp_path / "missing" / MANIFEST):
        Weights.find(tmp_path / "missing")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\xff",
        "[]",
        "null",
        "{}",
        '{"version": "1"}',
        '{"networks": {}}',
        '{"version": "1", "networks": []}',
        '{"version": "1", "networks": {"roi": null}}',
        '{"version": "1", "networks": {"roi": {"variant": "slim"}}}',
        '{"version": "1", "networks": {"roi": {"sha256": {}}}}',
        '{"version": "1", "networks": {"roi": {"variant": "slim", "sha256": ["roi.xml"]}}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with refused(tmp_path / MANIFEST):
        Weights.find(tmp_path)


def test_the_released_weights_are_found_beside_the_package_or_above_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PLACES", (folder / "none", folder))
    assert Weights.find().folder == folder
    monkeypatch.setattr(module, "_PLACES", (folder / "none", folder / "neither"))
    with refused(folder / "none" / MANIFEST):
        Weights.find()


def test_released_weights_are_whole() -> None:
    try:
        weights = Weights.find()
    except WeightsError:
        pytest.skip("no weights in this checkout")
    assert set(weights.sha256) == {
        f"{net}{suffix}" for net in ("roi", "organs") for suffix in (".safetensors", ".xml", ".bin")
    }
    for name in weights.sha256:
        assert weights.read(Path(name).stem, Path(name).suffix)
