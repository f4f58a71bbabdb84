"""The run report as one web page for people: table, pictures, a viewer per case, plots; nothing is fetched.

The page is rendered by Jinja2 from the report's JSON form and from what `viewer.page_pictures` made of each case. That
lies in a hidden folder beside the page while the run goes on, so that memory does not grow with the cases.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FastorganError
from .files import whole_file
from .labels import ORGANS
from .monitor import Sample

MOST_PICTURED = 100
"""Cases with pictures in one page, which are some 0.6 MB each: a telephone has to open it."""

_MOST_BARS, _MOST_POINTS = 40, 360
_ASSETS = Path(__file__).parent / "page"
# The plot's place for the curves in the picture's units.
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 712.0, 20.0, 208.0


@dataclass(frozen=True)
class ReportPage:
    """A page that is to be written, and the pictures gathered for it.

    Attributes:
        path: the page's file.
    """

    path: Path

    def begin(self) -> None:
        """Make the folder for pictures.

        Raises:
            FastorganError: the page's name does not end in .html, or its folder cannot be written to.
        """
        if self.path.suffix not in (".html", ".htm"):
            raise FastorganError(f"{self.path}: the name of a report page must end in .html")
        if self.path.exists() and not self.path.is_file():
            raise FastorganError(f"{self.path}: not a regular file; name a file for the report page")
        try:
            self._gathered.mkdir(exist_ok=True)
        except OSError as error:
            raise FastorganError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def wants(self, warned: bool) -> bool:
        """Whether there is room for the pictures of one more case; for a case with warnings there always is."""
        try:
            return warned or sum(1 for _ in self._gathered.iterdir()) < MOST_PICTURED
        except OSError:
            return False

    def gather(self, target: Path, pictures: Mapping[str, Any]) -> None:
        """Keep what `viewer.page_pictures` made of the case whose label file is `target`.

        Raises:
            FastorganError: it cannot be written.
        """
        place = self._place(target)
        try:
            with whole_file(place, ".json") as partial:
                partial.write_text(json.dumps(pictures), encoding="ascii")
        except OSError as error:
            raise FastorganError(f"{place}: cannot be written ({error.strerror or error})") from error

    def give_up(self) -> None:
        """Let go of what was gathered for a page that will not be written."""
        shutil.rmtree(self._gathered, ignore_errors=True)

    def write(self, report: Mapping[str, Any], samples: Sequence[Sample] = ()) -> None:
        """Write the page, whole or not at all, and let go of what was gathered.

        Args:
            report: as `RunReport.to_dict` returns it.
            samples: readings of memory over the run.

        Raises:
            FastorganError: the page cannot be written, or Jinja2 is not installed.
        """
        cases = [_case(case) for case in report["cases"]]
        pictured = self._chosen(cases)
        pieces = _render(report, cases, samples, pictured, lambda index: self._pictures(pictured, cases, index))
        try:
            with whole_file(self.path, ".html") as partial, partial.open("wb") as file:
                for piece in pieces:
                    # Bytes in a file's name that are no text are shown as such.
                    file.write(piece.encode("utf-8", errors="backslashreplace"))
        except OSError as error:
            raise FastorganError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self.give_up()

    @property
    def _gathered(self) -> Path:
        return self.path.with_name(f".{self.path.name}.pictures")

    def _place(self, target: Path) -> Path:
        # Label files of a run differ in their whole path, which is no file's name.
        import hashlib

        return self._gathered / f"{hashlib.sha256(bytes(target.absolute())).hexdigest()[:32]}.json"

    def _chosen(self, cases: Sequence[Mapping[str, Any]]) -> set[int]:
        """Which cases get pictures: those with warnings, then the first ones."""
        there = [i for i, case in enumerate(cases) if case["output"] and self._place(Path(case["output"])).is_file()]
        there.sort(key=lambda index: (not cases[index]["problems"], index))
        return set(there[:MOST_PICTURED])

    def _pictures(self, pictured: set[int], cases: Sequence[Mapping[str, Any]], index: int) -> Mapping[str, Any] | None:
        if index not in pictured:
            return None
        content: Mapping[str, Any] = json.loads(self._place(Path(cases[index]["output"])).read_text(encoding="ascii"))
        return content


def _render(
    report: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    pictured: set[int],
    pictures: Any,
) -> Iterable[str]:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise FastorganError("a report page needs Jinja2, which is not installed; try: pip install jinja2") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "volume": lambda ml: _number(ml, 0 if ml >= 10 else 1),
        "seconds": lambda s: "not finished" if s is None else f"{_number(s, 1)} s",
        "file_name": lambda name: Path(name).name,
        # What lies in a script element may not hold "</script>".
        "scan": lambda content: Markup(
            json.dumps({key: value for key, value in content.items() if key != "preview"}).replace("<", "\\u003c")
        ),
    }
    bars, stages = _bars(cases)
    pieces: Iterable[str] = environment.get_template("page.html").generate(
        run=report,
        cases=cases,
        organs=ORGANS,
        pictures=pictures,
        left_out=sum(1 for case in cases if case["organs"]) - len(pictured),
        starred=any(organ["touches_border"] for case in cases for organ in (case["organs"] or {}).values()),
        bars=bars,
        stages=stages,
        memory=_plot(samples),
        cell=lambda value, digits: Markup(
            f'<td class="n" data-value="{"" if value is None else value}">{_number(value, digits)}</td>'
        ),
        style=Markup((_ASSETS / "page.css").read_text(encoding="utf-8")),
        script=Markup((_ASSETS / "page.js").read_text(encoding="utf-8")),
    )
    return pieces


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _case(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case of the report with its name, and with its error among its warnings."""
    from .volume import stem

    problems = [case["error"]] * (case["error"] is not None) + list(case["warnings"])
    # Files of the same case have the same name; the label file's is the one to look for.
    return dict(case) | {"name": stem(Path(case["output"] or case["input"])), "problems": problems}


def _bars(cases: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Seconds by stage of the cases that were timed, the slowest ones where they are many, in the run's order."""
    timed = [i for i, case in enumerate(cases) if case["seconds"]]
    totals = {i: sum(cases[i]["seconds"].values()) for i in timed}
    slowest = sorted(sorted(timed, key=lambda i: -totals[i])[:_MOST_BARS])
    stages = list(dict.fromkeys(stage for i in slowest for stage in cases[i]["seconds"]))
    longest = max((totals[i] for i in slowest), default=0.0) or 1.0
    bars = [
        {
            "name": cases[i]["name"],
            "seconds": totals[i],
            "share": totals[i] / longest,
            "parts": [
                {"stage": stage, "index": stages.index(stage), "seconds": seconds}
                for stage, seconds in cases[i]["seconds"].items()
            ],
        }
        for i in slowest
    ]
    return bars, stages


def _plot(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Curves of memory over time in the picture's coordinates; None where nothing was read."""
    curves = {
        "rss": [(s.seconds, s.rss_mib) for s in samples if s.rss_mib is not None],
        "gpu": [(s.seconds, s.device_mib) for s in samples if s.device_mib is not None],
    }
    if not curves["rss"]:
        return None
    top = max(mib for curve in curves.values() for _, mib in curve)
    end = max(seconds for curve in curves.values() for seconds, _ in curve) or 1.0
    y_step, x_step = _step(top, 4), _step(end, 8)
    highest = y_step * math.ceil(top / y_step)

    def x(seconds: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * seconds / end

    def y(mib: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * mib / highest

    def points(curve: list[tuple[float, float]]) -> str:
        # The highest of each stretch: a plot of memory must not hide its peaks.
        stretch = math.ceil(len(curve) / _MOST_POINTS)
        kept = [max(curve[i : i + stretch], key=lambda reading: reading[1]) for i in range(0, len(curve), stretch or 1)]
        return " ".join(f"{x(seconds):.1f},{y(mib):.1f}" for seconds, mib in kept)

    return {
        "rss": points(curves["rss"]),
        "gpu": points(curves["gpu"]),
        "top_rss": max(mib for _, mib in curves["rss"]),
        "y_ticks": [{"at": y(mib), "text": f"{mib:g}"} for mib in _ticks(highest, y_step)],
        "x_ticks": [{"at": x(seconds), "text": f"{seconds:g} s"} for seconds in _ticks(end, x_step)],
    }


def _step(highest: float, most: int) -> float:
    """A round distance between ticks, so that there are at most about `most` of them."""
    rough = max(highest, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _ticks(highest: float, step: float) -> list[float]:
    return [round(step * i, 9) for i in range(int(highest / step + 1e-9) + 1)]
