"""Files that are either whole or not there."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path, suffix: str) -> Iterator[Path]:
    """Give the `with` block a name to write to, which takes `path`'s place once the block has ended.

    Where the block raises, `path` stays as it was and the half-written file goes. A new file made by the block has the
    permissions that the umask gives; those of `tempfile` could be read by their owner alone.

    Args:
        path: the file to write; one that is there is replaced.
        suffix: of the name given, for writers that choose the format by it, such as ".nii.gz".

    Raises:
        OSError: the file cannot take its place.
    """
    # In the same folder: a file system replaces a name at once only within itself.
    partial = path.parent / f".fastorgan-{secrets.token_hex(8)}{suffix}"
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
