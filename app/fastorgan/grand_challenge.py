"""Where grand-challenge.org puts the scans of an algorithm's container, and looks for its label files."""

from pathlib import Path

from .errors import VolumeError

SUFFIX = ".mha"
"""Of its images, read and written."""

CT = "ct"
"""Name of its socket for CT images."""


def image_folders(inputs: Path, output: Path, socket: str) -> tuple[Path, Path]:
    """Return the folder of the CTs and the one for the label files: INPUTS/images/ct and OUTPUT/images/SOCKET.

    Args:
        inputs: usually /input.
        output: usually /output.
        socket: the output socket's slug.

    Raises:
        VolumeError: if the inputs have no such folder, nor one other socket's alone.
    """
    images = inputs / "images"
    try:
        sockets = sorted(folder for folder in images.iterdir() if folder.is_dir())
    except OSError as error:
        raise VolumeError(f"{images}: cannot be read ({error.strerror or error})") from error
    if images / CT in sockets:
        return images / CT, output / "images" / socket
    if len(sockets) == 1:
        return sockets[0], output / "images" / socket
    raise VolumeError(f"{images}: holds neither {CT}/ nor one folder of another name")
