"""Draw what runs have logged: the training loss, and Dice on the patients left out."""

from collections.abc import Sequence
from pathlib import Path

from fastorgan.errors import FastorganError

from .cases import DataError
from .log import SCORES, read_curves


class PlotError(FastorganError):
    """The figure cannot be drawn or written."""


def draw_curves(logs: Sequence[Path], path: Path) -> None:
    """Draw loss and, where patients were left out, Dice of several runs against their steps, as a PNG.

    Args:
        logs: each in the folder of its run, by whose name it is told.
        path: of the picture.

    Raises:
        DataError: if a log cannot be read or has no line.
        PlotError: if matplotlib is not installed or the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("matplotlib is not installed; pip install 'fastorgan[evaluation]'") from error
    runs = {log: read_curves(log) for log in logs}
    empty = [log for log, curves in runs.items() if not curves]
    if empty:
        raise DataError(f"{empty[0]}: the run has logged nothing yet")
    panels: list[tuple[str, dict[str, str]]] = [("training loss", {"loss": ""})]
    if any(column in curves for curves in runs.values() for column in SCORES):
        panels.append(("Dice of patients left out", SCORES))
    figure = Figure(figsize=(8.0, 3.4 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (label, columns) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for log, curves in runs.items():
            for column, name in columns.items():
                if column in curves:
                    told = f"{log.parent.name} {name}".strip()
                    axis.plot(curves[column].steps, curves[column].values, label=told, marker=".")
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        # Beside the panel: within, it would lie on one curve or another.
        legend = axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        for text in legend.get_texts():
            # A folder's name may have dollar signs, which are no formula.
            text.set_parse_math(False)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise PlotError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
