"""The straightforward way to run the same cascade, for `benchmark` to compare with.

What a first version would do: nibabel's `get_fdata`, SciPy's `zoom` on the whole volume in floats, torch in float32,
the mask of the ROI net at full size, logits at full size, SciPy's components there. Weights, HU window and boxes are
fastorgan's own, so that both do the same job. `python -m evaluation.reference CT LABELS` prints its seconds as JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    """Segment one file and print the seconds of each stage."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.reference", description=__doc__)
    parser.add_argument("ct", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)

    import nibabel as nib
    import numpy as np
    from scipy import ndimage

    from fastorgan.box import CROP_SIZE, ROI_SIZE, Box, extent_mm, frame
    from fastorgan.intensity import WINDOW_HU, to_network
    from fastorgan.labels import ORGANS
    from fastorgan.monitor import StageTimer
    from fastorgan.postprocess import LEAST_MM3
    from fastorgan.runtime import TorchRuntime
    from fastorgan.weights import Weights

    runtime = TorchRuntime("cpu", args.threads)
    weights = Weights.find()
    roi_net, organ_net = runtime.load(weights, "roi"), runtime.load(weights, "organs")
    loaded = time.perf_counter()

    def zoom(array: Any, size: tuple[int, ...], order: int = 1) -> Any:
        factors = np.divide(size, array.shape)
        return ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)

    timer = StageTimer()
    with timer.stage("read"):
        image: Any = nib.load(args.ct)
        upright = nib.as_closest_canonical(image)
        volume = upright.get_fdata().transpose(2, 1, 0)
        spacing = upright.header.get_zooms()[2::-1]
    with timer.stage("roi"):
        low, high = WINDOW_HU
        unit = np.clip((volume - low) / (high - low), 0.0, 1.0)
        voxel = tuple(float(step) for step in spacing)
        start, stop = extent_mm(unit > 0, voxel)
        first, last = np.rint(start / voxel).astype(int), np.rint(stop / voxel).astype(int)
        body = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        logits = roi_net(to_network(zoom(unit[body], ROI_SIZE)).astype(np.float32))
        mask = np.zeros(volume.shape, bool)
        mask[body] = zoom(logits[0], unit[body].shape) > 0
        pieces, _ = ndimage.label(mask)
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        box = frame(*extent_mm(pieces == sizes.argmax(), voxel), Box.whole(volume.shape), voxel)
    with timer.stage("organs"):
        first, last = np.floor(box.start).astype(int), np.ceil(box.stop).astype(int)
        crop = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        logits = organ_net(to_network(zoom(unit[crop], CROP_SIZE)).astype(np.float32))
    with timer.stage("restore"):
        full = np.stack([zoom(logit, unit[crop].shape) for logit in logits])
        classes = full.argmax(axis=0).astype(np.uint8)
        labels = np.zeros(volume.shape, np.uint8)
        for organ in ORGANS:
            pieces, count = ndimage.label(classes == organ.code)
            sizes = np.bincount(pieces.ravel(), minlength=1)
            sizes[0] = 0
            least = LEAST_MM3[organ.name] / np.prod(voxel)
            kept = [k for k in np.argsort(sizes)[::-1][: organ.components] if sizes[k] >= least]
            if count and kept:
                labels[crop][np.isin(pieces, kept)] = organ.code
    with timer.stage("write"):
        turned = nib.Nifti1Image(labels.transpose(2, 1, 0), upright.affine)
        back = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(upright.affine), nib.orientations.io_orientation(image.affine)
        )
        nib.save(turned.as_reoriented(back), args.labels)
    seconds = {"load": loaded - BEGUN, "case": time.perf_counter() - loaded, "stages": timer.seconds}
    print(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
