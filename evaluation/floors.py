"""What no program could do without: the floors under fastorgan's time on this machine."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastorgan.gzipped import open_packed, pack_to
from fastorgan.volume import load_image

ROI_MACS = 3.29e9
"""Multiplications of the slim ROI net at 96 x 96 x 96 (`docs/performance.md`)."""

ORGAN_MACS = 23.98e9
"""Multiplications of the DenseVNet at 96 x 128 x 192."""


def floors(ct: Path, repeats: int = 5) -> dict[str, float]:
    """Measure the floors, the fastest of `repeats` each, in seconds by name.

    Args:
        ct: a .nii.gz file.
        repeats: how often each is done.

    Raises:
        VolumeError: if the file cannot be opened.
    """
    image = load_image(ct)
    voxels = math.prod(image.shape)
    room = bytearray(1 << 20)

    def inflate() -> None:
        with open_packed(ct) as stream:
            while stream.readinto(room):
                pass

    stored = np.full(voxels, 1, np.int16)
    labels = np.zeros(voxels, np.uint8)

    def pack() -> None:
        with pack_to(Path("/dev/null")) as stream:
            stream.write(labels.data)

    # As large as the product of the last dense stack's layers, and long enough for every core to be at work.
    a, b = (np.ones((2048, 2048), np.float32) for _ in range(2))
    product = _fastest(lambda: np.matmul(a, b), repeats)
    rate = 2048**3 / product
    return {
        "read the file's bytes": _fastest(ct.read_bytes, repeats),
        "unpack them": _fastest(inflate, repeats),
        "go through the voxels once": _fastest(stored.max, repeats),
        "pack empty labels": _fastest(pack, repeats),
        "both networks, at a large matrix product's rate": (ROI_MACS + ORGAN_MACS) / rate,
        "start Python": _fastest(lambda: _python("pass"), repeats),
        "start Python, import numpy": _fastest(lambda: _python("import numpy"), repeats),
        "start Python, import openvino": _fastest(lambda: _python("import openvino"), repeats),
    }


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def _fastest(work: Callable[[], object], repeats: int) -> float:
    best = math.inf
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best
