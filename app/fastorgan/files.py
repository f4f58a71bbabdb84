"""Files that are either whole or not there."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".fastorgan-"


@contextmanager
def whole_file(path: Path, suffix: str) -> Iterator[Path]:
    """Give the `with` block a name to write to, which takes `path`'s place once the block has ended.

    Where the block raises, `path` stays as it was and the half-written file goes. Where the process is killed, a hidden
    file is left, which `remove_abandoned` knows. The content is on the disk before the name is, so that a power cut
    leaves no empty file under it. A new file has the permissions that the umask gives; those of `tempfile` could be
    read by their owner alone.

    Args:
        path: the file to write; one that is there is replaced, a link too, and not what it leads to.
        suffix: of the name given, for writers that choose the format by it, such as ".nii.gz". An empty file of that
            name is there already.

    Raises:
        OSError: the file cannot take its place, or nothing was written.
    """
    # In the same folder: a file system replaces a name at once only within itself.
    partial = path.parent / f"{_PREFIX}{secrets.token_hex(8)}{suffix}"
    try:
        with partial.open("xb") as held:
            # Held until this process ends, however it ends.
            _lock(held.fileno())
            yield partial
            if os.fstat(held.fileno()).st_size == 0:
                raise FileNotFoundError(f"nothing was written to {path}")
            os.fsync(held.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove half-written files that killed processes left in a folder; those of running ones stay.

    Does nothing where the folder cannot be listed, or its file system knows no locks.
    """
    with suppress(OSError):
        for partial in folder.glob(f"{_PREFIX}*"):
            with suppress(OSError), partial.open("rb") as file:
                if _lock(file.fileno()):
                    partial.unlink()


def _lock(number: int) -> bool:
    """Lock an open file for this process; False where another one holds it, or there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
