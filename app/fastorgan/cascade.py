"""The method: a light U-Net finds the abdomen, a DenseVNet labels it (He & Luo, FLARE21, team hitcs)."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .box import CROP_SIZE, Box
from .intensity import to_network
from .monitor import StageTimer
from .plausibility import Evidence, examine
from .postprocess import organ_margins
from .report import Engine
from .resample import resize
from .restore import restore_labels
from .roi import Roi, locate, overview, widen
from .runtime import Runtime, choose_runtime
from .volume import Volume, label_image, read_volume
from .weights import Weights


@dataclass(frozen=True)
class Segmentation:
    """What the cascade found in a volume.

    Attributes:
        labels: uint8 organ codes in the file's axes.
        roi: where the organ net looked.
        seconds: wall seconds by stage.
        evidence: what is known of each organ that was found, by its name; see `plausibility`.
        device: name of the processor or card that ran the organ network; None if unknown.
        faults: one line for each device that was left while this ran.
    """

    labels: NDArray[np.uint8]
    roi: Roi
    seconds: dict[str, float] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    device: str | None = None
    faults: tuple[str, ...] = ()


class Cascade:
    """Both networks, loaded and ready; one object serves many cases and many threads.

    Example:
        >>> labels = Cascade.load().segment(nibabel.load("ct.nii.gz"))
    """

    def __init__(self, runtime: Runtime, weights: Weights):
        self.weights = weights
        self._runtime = runtime
        self._roi_net = runtime.load(weights, "roi")
        self._organ_net = runtime.load(weights, "organs")

    @classmethod
    def load(
        cls, device: str = "auto", *, engine: str = "auto", threads: int | None = None, weights: Path | None = None
    ) -> "Cascade":
        """Load the networks on a device; see `runtime.choose_runtime` for the arguments.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N".
            engine: "auto", "openvino" or "torch".
            threads: of the CPU engine.
            weights: another folder of weights than the released one.

        Raises:
            DeviceError: if there is no such device or engine.
            WeightsError: if the weights are missing or not the released ones.
        """
        return cls(choose_runtime(device, engine, threads), Weights.find(weights))

    @property
    def engine(self) -> Engine:
        """What runs the networks now; under "auto" the CPU takes over from a card that fails."""
        return self._runtime.engine

    @property
    def faults(self) -> tuple[str, ...]:
        """One line for each device that was meant to run the networks and does not."""
        return tuple(self._runtime.faults)

    def segment(self, image: nib.Nifti1Image) -> nib.Nifti1Image:
        """Label the organs of a CT in HU.

        Args:
            image: one three-dimensional volume in any orientation.

        Returns:
            A uint8 image of the same geometry: 1 liver, 2 kidney, 3 spleen, 4 pancreas.

        Raises:
            VolumeError: if the image is not a CT volume that can be read.
        """
        name = image.get_filename() or "the image"
        return label_image(self.find_organs(read_volume(image, str(name))).labels, image)

    def find_organs(self, volume: Volume) -> Segmentation:
        """Run the two stages on a volume, the second again in a larger box where an organ goes out of its box."""
        timer = StageTimer()
        known = len(self.faults)
        with timer.stage("roi"):
            body, whole = overview(volume)
            foreground = self._roi_net(whole)[0] > 0
            roi = locate(foreground, body, volume.shape, volume.spacing)
        crop, margins = self._look(volume, roi.box, timer)
        wider = widen(roi.box, margins, body, volume)
        if wider is not None:
            roi = replace(roi, box=wider)
            crop, margins = self._look(volume, wider, timer)
        device = self.engine.device_name
        with timer.stage("restore"):
            labels = restore_labels(margins, roi.box, volume)
        with timer.stage("check"):
            evidence = examine(margins, crop, roi.box, volume)
        return Segmentation(labels, roi, timer.seconds, evidence, device, self.faults[known:])

    def _look(
        self, volume: Volume, box: Box, timer: StageTimer
    ) -> tuple[NDArray[np.float32], dict[int, NDArray[np.float32]]]:
        """What the organ net sees of a box (z, y, x), HU window as [0, 1], and the organs' margins over it."""
        with timer.stage("organs"):
            crop = volume.unit(resize(volume.array, box, CROP_SIZE, volume.windowed))
            logits = self._organ_net(to_network(crop))
        with timer.stage("restore"):
            voxel_mm3 = np.prod(np.multiply(box.size, volume.spacing)) / np.prod(CROP_SIZE)
            return crop, organ_margins(logits, float(voxel_mm3))
