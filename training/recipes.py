"""How each network is trained: the paper's preset, the one that ships, and two ends of it."""

from dataclasses import dataclass, field, replace

from fastorgan.box import CROP_SIZE, ROI_SIZE


@dataclass(frozen=True)
class Augmentation:
    """How strongly samples are disturbed; standard deviations unless said otherwise.

    Attributes:
        face_mm: error of each face of the organs' extent before it is framed.
        cut: chance that the scan is cut short at one or both ends (z).
        narrow: chance that it shows less from side to side (x), as scans of the spine do; two thirds of it from front
            to back (y).
        padded: chance that air lies beyond the scan's ends (z), as in grids that were resampled or padded.
        padding_mm: upper limit of that air above and below.
        tilt_degrees: lean of the planes in which such a scan ends, about x and about y.
        turn_degrees: rotation about z; half of it about the other axes.
        stretch: relative scale error per axis.
        bend_mm: displacement of the knots of a random field, about 40 mm apart, before it is smoothed.
        gamma: of the window's values, log scale.
        shift_hu, contrast: of the whole volume.
        organ_hu: of each organ by itself.
        noise_hu: upper limit of white noise.
        blur: chance of a blur, in plane or along z (thick slices).
        filled: chance that contrast agent, water or stool takes the place of gas in the bowel (organ net only).
    """

    face_mm: float = 7.0
    cut: float = 0.35
    narrow: float = 0.15
    padded: float = 0.3
    padding_mm: float = 60.0
    tilt_degrees: float = 10.0
    turn_degrees: float = 15.0
    stretch: float = 0.13
    bend_mm: float = 14.0
    gamma: float = 0.25
    shift_hu: float = 25.0
    contrast: float = 0.20
    organ_hu: float = 30.0
    noise_hu: float = 45.0
    blur: float = 0.3
    filled: float = 0.4


GENTLE = Augmentation(
    turn_degrees=10.0,
    stretch=0.08,
    bend_mm=8.0,
    gamma=0.12,
    shift_hu=15.0,
    contrast=0.10,
    organ_hu=15.0,
    noise_hu=30.0,
    filled=0.0,
)
"""About half as strong: nearer to real scans, with the same cuts and fields of view."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides its data, length and seed.

    Attributes:
        optimiser: "sgd", "adamw" or "muon" (`training.optimisers`).
        rate: initial learning rate, reduced by (1 - progress) ** 0.9 (poly decay).
        loss: "focal" or "entropy+dice".
        drop: dropout rate.
        guided: whether the image guides the enlargement of the organs' logits (`fastorgan.networks.guided`).
        size: samples (z, y, x) that the network trains at.
        augment: "torch" (on the training device, `sampling`), or "batchgenerators" (the paper's three kinds).
        warm_up: steps over which the rate rises from zero.
        average: decay of the exponential moving average of the weights that is exported; 0 exports the last weights.
        steps, epochs: default length; the paper has 600 epochs of one step per case.
        weight_decay: of every parameter.
        structures: weight of the loss of further organs, where the cache has them (`training.structures`); 0 leaves
            them out.
        augmentation: strengths for augment="torch".
        gently: share of the samples that `GENTLE` takes the place of `augmentation` for.
        borders: weight of the cross-entropy at the borders of organs, with loss="entropy+dice" (`losses`).
    """

    optimiser: str
    rate: float
    loss: str
    drop: float
    guided: bool
    size: tuple[int, int, int]
    augment: str
    warm_up: int
    average: float
    steps: int | None = None
    epochs: int | None = None
    weight_decay: float = 1e-4
    structures: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    gently: float = 0.0
    borders: float = 0.0


LIGHT = Recipe("muon", 2e-3, "entropy+dice", 0.0, True, CROP_SIZE, "torch", 100, 0.998, steps=12000, structures=0.3)
"""What ships."""

MIXED = replace(LIGHT, rate=1.2e-3, steps=1750, structures=0.0, gently=0.5)
"""An end of it, in which every second sample is disturbed less."""

PRESETS = {
    # He & Luo, table 3: SGD 0.01, poly decay 0.9, focal loss, 600 epochs, batch 1, rotation, scaling and noise.
    "paper": Recipe("sgd", 0.01, "focal", 0.5, False, CROP_SIZE, "batchgenerators", 0, 0.0, epochs=600),
    "light": LIGHT,
    # Ends of a run, to be averaged with each other or with what they go on from. Too short to train the further
    # organs' head anew.
    "gentle": replace(LIGHT, rate=8e-4, steps=400, structures=0.0, augmentation=GENTLE),
    "mixed": MIXED,
    "bordered": replace(MIXED, borders=1.0),
}
"""By name; the ROI net takes its size from `ROI_SIZE` under any."""


def sized(recipe_size: tuple[int, int, int], network: str) -> tuple[int, int, int]:
    """The size that `network` ("organs" or "roi") trains at under a recipe."""
    return ROI_SIZE if network == "roi" else recipe_size
