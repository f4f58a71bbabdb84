"""Gzip streams: by ISA-L, which packs and unpacks several times as fast as zlib, or by the standard library where there
is no wheel of it for the machine.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GzipFile: Any = gzip.GzipFile

DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error)
"""What reading a damaged or cut file may raise."""

try:
    from isal import igzip, igzip_lib
except ImportError:
    pass
else:
    GzipFile = igzip.IGzipFile
    DAMAGE += (igzip_lib.IsalError,)  # type: ignore[operator]  # its stub takes the class for an instance

LEVEL = 1
"""Of compression: on labels ISA-L's higher levels take as long or longer and give files no smaller."""


def open_packed(path: str | Path) -> gzip.GzipFile:
    """Open a .gz file for reading; reading to its end checks the length and checksum that are stored there."""
    stream: gzip.GzipFile = GzipFile(path, "rb")
    return stream


@contextmanager
def pack_to(path: Path) -> Iterator[gzip.GzipFile]:
    """Open a .gz file for writing; neither its name nor the time goes into it.

    Now and then ISA-L packs the same content into other bytes (intel/isa-l issue 140); unpacked they are the same.
    """
    with path.open("wb") as file, GzipFile("", "wb", LEVEL, file, 0) as stream:
        yield stream
