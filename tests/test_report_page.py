"""The page's text and structure; `test_report_page_browser.py` opens it."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastorgan import report_page
from fastorgan.errors import FastorganError
from fastorgan.monitor import MemoryPeak, Sample
from fastorgan.report import CaseRecord, Engine, OrganMeasure, RunReport, Status
from fastorgan.report_page import ReportPage

ORGANS = {
    "liver": OrganMeasure(1500.04, True),
    "kidney": OrganMeasure(300.0, False),
    "spleen": OrganMeasure(9.96, False),
    "pancreas": OrganMeasure(0.0, False),
}
PICTURES = {
    "preview": "data:image/webp;base64,QUJD",
    "preview_size": [11, 12],
    "shape": [1, 2, 3],
    "spacing_mm": [1.0, 1.0, 1.0],
    "across": 1,
    "code_step": 50,
    "first": [0, 0, 0],
    "ct": "data:image/webp;base64,REVG",
    "labels": "data:image/png;base64,R0hJ",
}
HOSTILE = "</script><script>alert(1)</script>'\"&"


def record(name: str, **facts: Any) -> CaseRecord:
    return CaseRecord(
        f"in/{name}_0000.nii.gz",
        Status.DONE,
        f"out/{name}.nii.gz",
        organs=ORGANS,
        seconds={"read": 0.25, "roi": 0.5},
        total_seconds=0.8,
        memory=MemoryPeak(None, None, 512.4, "the run uses no GPU"),
        **facts,
    )


def run(*cases: CaseRecord) -> dict[str, Any]:
    engine = Engine("openvino", "2026.0", "cpu", "test processor", "f32", 2)
    report = RunReport(engine, {"roi.bin": "ab" * 32}, {}, cases=list(cases), total_seconds=3.0)
    return report.to_dict()


class Elements(HTMLParser):
    """Each element's name, attributes and own text; void elements have none."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        assert self._open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "input", "img"):
            self._open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[self._open[-1]][2].append(data)

    def of(self, tag: str, name: str | None = None) -> Iterator[tuple[dict[str, str | None], str]]:
        for kind, attributes, texts in self.found:
            if kind == tag and (name is None or name in (attributes.get("class") or "").split()):
                yield attributes, "".join(texts)


def written(tmp_path: Path, report: dict[str, Any], *samples: Sample, pictured: tuple[str, ...] = ()) -> str:
    page = ReportPage(tmp_path / "report.html")
    page.begin()
    for target in pictured:
        page.gather(Path(target), PICTURES)
    page.write(report, samples)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_table_has_a_row_per_case_with_values_to_sort_by(tmp_path: Path) -> None:
    failed = CaseRecord("in/bad.nii.gz", Status.FAILED, error="bad.nii.gz: damaged", total_seconds=0.1)
    page = Elements(written(tmp_path, run(record("a", warnings=["odd"]), failed)))
    values = [attributes["data-value"] for attributes, _ in page.of("td") if "data-value" in attributes]
    assert values == ["1500.04", "300.0", "9.96", "0.0", "0.8", "", "512.4", "1", "", "", "", "", "0.1", "", "", "1"]
    shown = [text for attributes, text in page.of("td", "n")][:8]
    assert shown == ["1500", "300", "10.0", "", "0.80", "–", "512", "–"]
    assert [text for _, text in page.of("abbr")] == ["*"]  # the liver reaches the edge
    assert [attributes["href"] for attributes, _ in page.of("a")] == ["#cases", "#case-1", "#case-2"]
    assert {"case-1", "case-2"} <= {attributes.get("id") for attributes, _ in page.of("details")}


def test_the_page_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, run(record("a")), pictured=("out/a.nii.gz",))
    page = Elements(text)
    policy = next(a["content"] for a, _ in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert not list(page.of("link"))
    assert all("src" not in attributes for attributes, _ in page.of("script"))
    assert all(str(attributes["src"]).startswith("data:") for attributes, _ in page.of("img"))
    assert not re.search(r"https?:|url\(|@import", text)


def test_pictures_are_embedded_and_the_viewers_data_is_json(tmp_path: Path) -> None:
    page = Elements(written(tmp_path, run(record("a"), record("b")), pictured=("out/b.nii.gz",)))
    ((image, _),) = page.of("img", "preview")
    assert (image["src"], image["width"], image["height"]) == (PICTURES["preview"], "11", "12")
    (content,) = (text for attributes, text in page.of("script") if attributes.get("type") == "application/json")
    assert json.loads(content) == {key: value for key, value in PICTURES.items() if key != "preview"}


def test_names_cannot_break_out(tmp_path: Path) -> None:
    text = written(tmp_path, run(record(HOSTILE, warnings=[HOSTILE])), pictured=(f"out/{HOSTILE}.nii.gz",))
    assert "<script>alert" not in text
    page = Elements(text)
    assert len(list(page.of("script"))) == 2
    # The name of a file: what stands before its last slash is the folder's.
    assert HOSTILE.split("/")[-1] in [text for _, text in page.of("span", "name")]
    assert HOSTILE in [text for _, text in page.of("li")]


def test_a_name_that_is_no_text_is_shown_somehow(tmp_path: Path) -> None:
    assert "gr\\udcf6\\udcdfe" in written(tmp_path, run(record("gr\udcf6\udcdfe")))


def test_weights_and_versions_are_there(tmp_path: Path) -> None:
    text = written(tmp_path, run(record("a")))
    for part in ("ab" * 32, "roi.bin", "openvino 2026.0, f32, 2 threads", "test processor"):
        assert part in text


def test_memory_is_plotted_over_time(tmp_path: Path) -> None:
    samples = (Sample(0.0, None, None, 0.0), Sample(5.0, None, None, 400.0), Sample(10.0, None, None, 200.0))
    page = Elements(written(tmp_path, run(record("a")), *samples))
    ((curve, _),) = page.of("polyline")
    assert curve["points"] == "56.0,208.0 384.0,20.0 712.0,114.0"  # 400 MiB is the top of the plot
    ticks = [text for _, text in page.of("text")]
    assert ticks == ["0", "100", "200", "300", "400", "0 s", "2 s", "4 s", "6 s", "8 s", "10 s", "MiB"]


def test_a_long_runs_plot_keeps_its_peaks() -> None:
    samples = [Sample(i / 10, 100.0, None, 900.0 if i == 7777 else 100.0) for i in range(20_000)]
    plot = report_page._plot(samples)
    assert plot is not None
    points = plot["rss"].split()
    assert len(points) <= report_page._MOST_POINTS
    assert min(float(point.split(",")[1]) for point in points) == pytest.approx(20 + 188 * (1 - 900 / 1000), abs=0.1)
    assert plot["gpu"]


def test_bars_show_the_slowest_of_many_cases(tmp_path: Path) -> None:
    cases = [record(f"case{i:03}") for i in range(60)]
    cases[5] = CaseRecord("in/slow.nii.gz", Status.DONE, "out/slow.nii.gz", organs=ORGANS, seconds={"read": 7.5})
    page = Elements(written(tmp_path, run(*cases)))
    widths = [attributes["style"] for attributes, _ in page.of("span", "bar")]
    assert len(widths) == report_page._MOST_BARS
    assert widths.count("width: 100.00%") == 1
    assert widths.count("width: 10.00%") == report_page._MOST_BARS - 1


def test_only_so_many_cases_have_pictures_and_those_with_warnings_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "MOST_PICTURED", 2)
    page = ReportPage(tmp_path / "report.html")
    page.begin()
    for name in "abc":
        assert page.wants(False) is (name != "c")
        assert page.wants(True)
        page.gather(Path(f"out/{name}.nii.gz"), PICTURES)
    page.write(run(record("a"), record("b"), record("c", warnings=["odd"])))
    elements = Elements(page.path.read_text())
    alts = [str(attributes["alt"]).split()[-1] for attributes, _ in elements.of("img")]
    assert alts == ["a", "c"]
    assert "1 case has no pictures" in page.path.read_text()


@pytest.mark.parametrize("name", ["report.pdf", "report", "none/report.html", "folder.html"])
def test_a_page_that_cannot_be_written_is_said_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(FastorganError, match=name):
        ReportPage(tmp_path / name).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_an_empty_run_makes_a_page(tmp_path: Path) -> None:
    assert "No case was timed." in written(tmp_path, run())


@pytest.mark.parametrize(("highest", "step"), [(1.0, 0.5), (400.0, 100.0), (714.0, 200.0), (3.0, 1.0), (0.0, 1e-9)])
def test_ticks_are_round(highest: float, step: float) -> None:
    assert report_page._step(highest, 4) == pytest.approx(step, rel=1e-6) or highest == 0.0
    assert np.isfinite(report_page._step(highest, 4))
