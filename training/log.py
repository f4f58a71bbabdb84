"""The log of a run: one line each time, in CSV."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastorgan.labels import ORGANS

from .cases import DataError

LOG = "log.csv"
"""Its name in the folder of a run."""

LOSSES = ("loss", "entropy", "dice_loss")
"""Columns of the training samples."""

SCORES = {"dice_foreground": "all organs"} | {f"dice_{organ.name}": organ.name for organ in ORGANS}
"""Columns of the patients left out, and their names."""

COLUMNS = ("step", "minutes", "rate", *LOSSES, "structures", *SCORES)


@dataclass
class Curve:
    """One column of a log.

    Attributes:
        steps, values: of the lines that have a value.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def append(log: Path, step: int, values: Mapping[str, float]) -> None:
    """Add a line, and the header to a log that is new; columns without a value stay empty."""
    new = not log.exists()
    with log.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({"step": step} | {key: f"{value:.6g}" for key, value in values.items()})


def read_curves(log: Path) -> dict[str, Curve]:
    """Losses and scores of a log by column, those without any value left out.

    Raises:
        DataError: if it cannot be read or is no log.
    """
    curves: dict[str, Curve] = {}
    try:
        with log.open(newline="") as stream:
            for line in csv.DictReader(stream):
                for column in (*LOSSES, *SCORES):
                    if line[column]:
                        curve = curves.setdefault(column, Curve())
                        curve.steps.append(int(line["step"]))
                        curve.values.append(float(line[column]))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{log}: cannot be read, or is no log of a run") from error
    return curves
