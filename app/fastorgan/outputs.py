"""What is made of a finished case besides its labels: picture, statistics, one file per organ, tables of the batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .box import Box
from .errors import FastorganError
from .label_tables import names_extension, write_tables
from .labels import ORGANS
from .monitor import Sample, StageTimer
from .organ_statistics import OrganStatistics, check_name, organ_statistics, write_statistics
from .report import RunReport
from .report_page import ReportPage
from .volume import Volume, label_image, make_folder, save_image, stem


@dataclass(frozen=True)
class FinishedCase:
    """A case whose labels are written.

    Attributes:
        name: the case's name, for people.
        target: its label file.
        image: the CT's file.
        volume: the CT.
        labels: organ codes in the file's axes.
        roi: where the organ net looked, in voxels of `volume`.
    """

    name: str
    target: Path
    image: nib.Nifti1Image
    volume: Volume
    labels: NDArray[np.uint8]
    roi: Box

    def beside(self, suffix: str) -> Path:
        """The label file's name with another suffix; "" gives a folder's name."""
        return self.target.with_name(stem(self.target) + suffix)


@dataclass(frozen=True)
class CaseOutputs:
    """What came of it.

    Attributes:
        warnings: one line for each thing that could not be written; the labels are there all the same.
        seconds: wall seconds by stage.
        statistics: by organ name; None where they were not asked for.
    """

    warnings: Sequence[str] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    statistics: Mapping[str, OrganStatistics] | None = None


@dataclass(frozen=True)
class Outputs:
    """What is wanted besides labels.

    Attributes:
        preview: a PNG beside each label file.
        split: a folder of one mask per organ beside each label file.
        statistics: the table of all cases, .csv or .json.
        label_tables: the labels' names and colours for 3D Slicer and ITK-SNAP, in each folder of label files.
        page: the run report as a web page.
        resume: keep the rows of the table that an earlier run wrote of other cases.
    """

    preview: bool = False
    split: bool = False
    statistics: Path | None = None
    label_tables: bool = False
    page: Path | None = None
    resume: bool = False

    def begin(self, folders: Sequence[Path]) -> None:
        """Write what needs no case, and say what cannot be written while no time has been lost yet.

        Raises:
            FastorganError: a file cannot be written, or not under its name.
        """
        if self.statistics is not None:
            check_name(self.statistics)
            write_statistics([], self.statistics, keep=self.resume)
        if self.page is not None:
            ReportPage(self.page).begin()
        if self.label_tables:
            for folder in folders:
                write_tables(folder)

    def of_case(self, case: FinishedCase, *, warned: bool = False) -> CaseOutputs:
        """Make what is wanted of one case. A failure is a warning: the labels are written already.

        Args:
            case: the case.
            warned: whether there are warnings about it, so that people will want to see it.
        """
        timer, warnings, statistics = StageTimer(), [], None
        if self.split:
            with timer.stage("split"):
                try:
                    _split(case)
                except FastorganError as error:
                    warnings.append(f"no file per organ: {error}")
        if self.statistics is not None:
            with timer.stage("statistics"):
                try:
                    statistics = organ_statistics(case.volume, case.labels, case.image)
                except FastorganError as error:
                    warnings.append(f"no statistics: {error}")
        warnings += self._draw(case, timer, warned or bool(warnings))
        return CaseOutputs(warnings, timer.seconds, statistics)

    def _draw(self, case: FinishedCase, timer: StageTimer, warned: bool) -> list[str]:
        """Draw the case for the preview, the page or both; returns the warnings."""
        page = ReportPage(self.page) if self.page is not None else None
        paged = page is not None and page.wants(warned)
        if not self.preview and not paged:
            return []
        from .preview import ShownCase, draw_case, save_preview

        warnings = []
        with timer.stage("preview"):
            try:
                shown = ShownCase.of(case.volume, case.labels, case.roi)
                picture = draw_case(shown, case.name)
                if self.preview:
                    save_preview(picture, case.beside(".png"))
            except FastorganError as error:
                return [f"no picture: {error}"]
        if page is not None and paged:
            from .viewer import page_pictures

            with timer.stage("page"):
                try:
                    page.gather(case.target, page_pictures(shown, picture))
                except FastorganError as error:
                    warnings.append(f"no picture in the report page: {error}")
        return warnings

    def are_beside(self, target: Path) -> bool:
        """Whether what is wanted beside a label file is there, by its name."""
        folder = target.with_name(stem(target))
        wanted = [target.with_name(f"{stem(target)}.png")] * self.preview
        wanted += [folder / f"{organ.name}{_suffix(target)}" for organ in ORGANS if self.split]
        return all(path.is_file() for path in wanted)

    def end(self, report: RunReport | None, samples: Sequence[Sample] = ()) -> None:
        """Write what is made of all cases together.

        Args:
            report: of the run; None if no case was begun.
            samples: readings of memory over the run.

        Raises:
            FastorganError: a file cannot be written.
        """
        if report is None:
            if self.page is not None:
                ReportPage(self.page).give_up()
            return
        if self.statistics is not None:
            rows = [(stem(Path(c.output)), c.statistics) for c in report.cases if c.output and c.statistics]
            write_statistics(rows, self.statistics, keep=self.resume)
        if self.page is not None:
            ReportPage(self.page).write(report.to_dict(), samples)


def _split(case: FinishedCase) -> None:
    """Write each organ's mask of 0 and 1 as a file of the organ's name in a folder of the case's name."""
    folder = case.beside("")
    make_folder(folder)
    for organ in ORGANS:
        mask = label_image((case.labels == organ.code).view(np.uint8), case.image)
        header: Any = mask.header
        header.extensions[:] = [names_extension({1: organ})]
        save_image(mask, folder / f"{organ.name}{_suffix(case.target)}")


def _suffix(target: Path) -> str:
    return target.name.removeprefix(stem(target))
