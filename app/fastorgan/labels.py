"""The organs, their codes and colours."""

from dataclasses import dataclass

IGNORE = 255
"""Code of voxels whose label is unknown; training and scoring leave them out."""


@dataclass(frozen=True)
class Organ:
    """One organ class.

    Attributes:
        code: the label's value, as FLARE21 has it.
        name: lower-case English name.
        components: how many connected pieces anatomy allows.
        colour: RGB, 0 to 255, the same in every picture.
    """

    code: int
    name: str
    components: int
    colour: tuple[int, int, int]


ORGANS = (
    Organ(1, "liver", 1, (216, 101, 79)),
    Organ(2, "kidney", 2, (185, 178, 60)),
    Organ(3, "spleen", 1, (91, 133, 201)),
    Organ(4, "pancreas", 1, (121, 186, 107)),
)
"""In the order of their codes; the networks' classes are background and these."""

CLASSES = 1 + len(ORGANS)
