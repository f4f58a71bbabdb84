"""Cross-validation end to end: a run's organ net segments the patients that the run left out."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastorgan import Cascade
from fastorgan.volume import load_image, make_folder, save_image
from fastorgan.weights import MANIFEST, Weights

from .cases import Case, DataError, find_cases
from .checkpoint import CHECKPOINT, read_checkpoint
from .export import export


def segment_left_out(
    run: Path, data: Path, out: Path, released: Path | None = None, cache: Path | None = None
) -> Iterator[Case]:
    """Label the cases of the patients left out, on their own grids, through the whole cascade.

    The run's network takes the place of the released one; the other network stays as it was released. The labels of
    all folds may go into one folder, where `python -m evaluation score` finds them.

    Args:
        run: folder of a run of `fit --fold`.
        data: the folder that the cache was prepared from.
        out: where NAME.nii.gz go.
        released: the folder of released weights; None for those of fastorgan.
        cache: as `export` takes it.

    Yields:
        Each case when its labels are written.

    Raises:
        DataError: if the run left nobody out, or a patient that it left out has no case in `data`.
        VolumeError: if a case cannot be read or its labels cannot be written.
        WeightsError: if there are no released weights, or the engines disagree on the run's.
    """
    patients = patients_left_out(run)
    cases = [case for case in find_cases(data) if case.patient in patients]
    missing = patients - {case.patient for case in cases}
    if missing:
        raise DataError(f"{data}: no case of {', '.join(sorted(missing))}, whom the run left out")
    make_folder(out)
    with weights_with(run, released, cache) as weights:
        cascade = Cascade.load("cpu", weights=weights)
        for case in cases:
            save_image(cascade.segment(load_image(case.image)), out / f"{case.name}.nii.gz")
            yield case


def patients_left_out(run: Path) -> set[str]:
    """The patients that a run left out.

    Raises:
        DataError: if it left nobody out, or its checkpoint cannot be read.
    """
    patients = set(read_checkpoint(run / CHECKPOINT, torch.device("cpu")).get("left_out", ()))
    if not patients:
        raise DataError(f"{run}: this run left no patient out; train with --fold")
    return patients


@contextmanager
def weights_with(run: Path, released: Path | None = None, cache: Path | None = None) -> Iterator[Path]:
    """A folder, for a while, of released weights in which a run's network takes the place of its own kind.

    Arguments and errors as of `segment_left_out`.
    """
    with tempfile.TemporaryDirectory(prefix="fastorgan-") as folder:
        weights = Path(folder)
        found = Weights.find(released)
        for name in (MANIFEST, *found.sha256):
            shutil.copyfile(found.folder / name, weights / name)
        kind = read_checkpoint(run / CHECKPOINT, torch.device("cpu"))["kind"]
        export(kind, run / CHECKPOINT, weights, "left-out", cache=cache)
        yield weights
