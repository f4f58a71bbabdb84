"""`fastorgan.gzipped` with ISA-L and without it."""

import gzip
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastorgan import gzipped

CONTENT = os.urandom(1_500_000) + bytes(1_500_000)


@pytest.fixture(params=["isal", "zlib"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is where ISA-L is installed, and where it is not."""
    if request.param == "isal":
        pytest.importorskip("isal")
        return gzipped
    monkeypatch.setitem(sys.modules, "isal", None)
    spec = importlib.util.spec_from_file_location("fastorgan.without_isal", gzipped.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.GzipFile is gzip.GzipFile
    return module


def test_what_is_packed_is_read_by_both(packing: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    with packing.pack_to(path) as stream:
        stream.write(CONTENT[:1000])
        stream.write(CONTENT[1000:])
    assert gzip.decompress(path.read_bytes()) == CONTENT
    assert 1_500_000 < path.stat().st_size < 1_550_000
    with packing.open_packed(path) as stream:
        assert stream.read() == CONTENT


def test_neither_name_nor_time_is_packed(packing: ModuleType, tmp_path: Path) -> None:
    with packing.pack_to(tmp_path / "name.gz") as stream:
        stream.write(CONTENT)
    header = (tmp_path / "name.gz").read_bytes()[:10]
    # No flag for a name; a time of 0 stands for none (RFC 1952).
    assert header[3] == 0
    assert header[4:8] == bytes(4)


@pytest.mark.parametrize("end", [1, 9, 100, 700_000, -9, -8, -4, -1])
def test_a_cut_file_is_damage(packing: ModuleType, tmp_path: Path, end: int) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(CONTENT)[:end])
    with pytest.raises(packing.DAMAGE), packing.open_packed(path) as stream:
        stream.read()


@pytest.mark.parametrize("place", [0, 1, 2, 700_000, -3000, -8, -5, -4, -1])
def test_a_changed_byte_is_damage(packing: ModuleType, tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.gz"
    content = bytearray(gzip.compress(CONTENT))
    content[place] ^= 64
    path.write_bytes(content)
    with pytest.raises(packing.DAMAGE), packing.open_packed(path) as stream:
        stream.read()
