"""The report page in headless Chromium: it sorts, filters, and its viewer shows the voxels that it was given.

Needs the package `playwright` and Debian's `chromium` (or another named by CHROMIUM); BROWSER_TESTS=required turns
their absence into a failure.
"""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fastorgan.labels import ORGANS
from fastorgan.monitor import Sample
from fastorgan.preview import ShownCase, draw_case
from fastorgan.report import CaseRecord, Engine, OrganMeasure, RunReport, Status
from fastorgan.report_page import ReportPage
from fastorgan.viewer import page_pictures
from fastorgan.volume import read_volume

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
# An organ of each side: liver at the right front, spleen at the left back.
LIVER, SPLEEN = ORGANS[0], ORGANS[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "the package playwright"
    else:
        missing = "" if CHROMIUM else "chromium (apt-get install chromium)"
    if missing:
        if os.environ.get("BROWSER_TESTS") == "required":
            pytest.fail(f"{missing} is not installed")
        pytest.skip(f"{missing} is not installed: the report page is not tested in a browser")
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start as root, and what it opens here is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three cases, the second with pictures and a warning, the third failed."""
    hu, codes = np.full((60, 50, 40), -900, np.int16), np.zeros((60, 50, 40), np.uint8)
    hu[5:55, 5:45] = 50
    codes[35:50, 28:42, 12:30] = LIVER.code
    codes[10:20, 8:18, 12:30] = SPLEEN.code
    case = ShownCase.of(read_volume(nib.Nifti1Image(hu, np.diag([5.0, 5.0, 5.0, 1.0])), "ct"), codes, None)

    def record(name: str, liver: float, seconds: float, warnings: list[str]) -> CaseRecord:
        organs = {organ.name: OrganMeasure(liver if organ is LIVER else 100.0, False) for organ in ORGANS}
        return CaseRecord(
            f"{name}.nii.gz", Status.DONE, f"out/{name}.nii.gz", warnings=warnings, organs=organs,
            seconds={"read": seconds / 2, "organs": seconds / 2}, total_seconds=seconds,
        )  # fmt: skip

    cases = [
        record("case10", 900.0, 3.0, []),
        record("case9", 1500.0, 1.0, ["doubtful"]),
        CaseRecord("bad.nii.gz", Status.FAILED, error="bad.nii.gz: damaged", total_seconds=0.1),
    ]
    engine = Engine("openvino", "2026.0", "cpu", "test processor", "f32", 2)
    report = RunReport(engine, {"roi.bin": "ab" * 32}, {}, cases=cases, total_seconds=4.0)
    page = ReportPage(tmp_path_factory.mktemp("page") / "report.html")
    page.begin()
    page.gather(Path("out/case9.nii.gz"), page_pictures(case, draw_case(case, "case9")))
    page.write(report.to_dict(), [Sample(i / 10, 500.0 + i, None, 300.0 + i) for i in range(40)])
    return page.path


@pytest.fixture
def faults() -> list[str]:
    return []


@pytest.fixture
def page(browser: "Browser", page_file: Path, faults: list[str]) -> Iterator["Page"]:
    """The page as a desktop has it, without a network; what the console says is a fault."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    page = context.new_page()
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else faults.append(request.url)
    )
    page.goto(page_file.as_uri())
    yield page
    context.close()
    assert faults == []


def names(page: "Page") -> list[str]:
    return page.locator("#overview tbody th").all_text_contents()


def pixels(page: "Page") -> Any:
    """The viewer's canvas as (rows, columns, 3)."""
    address = page.evaluate("document.querySelector('#case-2 canvas').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def opened(page: "Page") -> Any:
    page.click("#case-2 summary")
    page.wait_for_selector("#case-2 .viewer:not([hidden])")
    return page.locator("#case-2 .viewer")


def share(image: Any, colour: tuple[int, int, int]) -> Any:
    """Where the picture leans to an organ's colour by its opacity of 25 % over grey."""
    grey_parts = image.astype(int) - image.astype(int).mean(axis=2, keepdims=True)
    lean = np.array(colour) - np.mean(colour)
    return (grey_parts @ lean) / (lean @ lean) > 0.12


def test_the_table_sorts_by_click_and_by_keyboard(page: "Page") -> None:
    assert names(page) == ["case10", "case9", "bad"]
    page.get_by_role("button", name="Liver, ml").click()
    assert names(page) == ["case9", "case10", "bad"]
    heading = page.locator("#overview thead th").nth(1)
    assert heading.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="Liver, ml").press("Enter")
    assert names(page) == ["case10", "case9", "bad"]  # what is unknown stays last
    assert heading.get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="Case", exact=True).press("Space")
    assert names(page) == ["bad", "case9", "case10"]  # 9 before 10
    page.get_by_role("button", name="Warnings").click()
    assert names(page)[2] == "case10"


def test_the_filter_hides_rows_and_cases(page: "Page") -> None:
    page.get_by_label("Filter").fill("DOUBT")
    assert page.locator("#overview tbody tr:visible").count() == 1
    assert page.locator("details.case:visible").count() == 1
    assert page.locator("#shown").text_content() == "1 of 3"
    page.get_by_label("Filter").fill("")
    assert page.locator("#overview tbody tr:visible").count() == 3


def test_a_link_of_the_table_opens_its_case(page: "Page") -> None:
    page.get_by_role("link", name="case9").click()
    page.wait_for_selector("#case-2[open] .viewer:not([hidden])")


def test_the_viewer_shows_each_organ_on_its_side(page: "Page") -> None:
    opened(page)
    image = pixels(page)
    rows, columns = np.nonzero(share(image, LIVER.colour))
    assert columns.max() < image.shape[1] / 2  # the patient's right is on the left
    assert rows.max() < image.shape[0] / 2 + 5  # the front is up
    assert np.nonzero(share(image, SPLEEN.colour))[1].min() > image.shape[1] / 2


def test_organs_can_be_hidden_and_made_opaque(page: "Page") -> None:
    viewer = opened(page)
    with_liver = share(pixels(page), LIVER.colour).sum()
    viewer.get_by_label("liver").uncheck()
    without = pixels(page)
    assert with_liver > 5000
    assert share(without, LIVER.colour).sum() < 50
    assert share(without, SPLEEN.colour).sum() > 2000
    viewer.get_by_label("liver").check()
    viewer.get_by_label("Opacity").fill("100")
    assert (np.abs(pixels(page).astype(int) - LIVER.colour).max(axis=2) < 6).sum() > 5000
    viewer.get_by_label("Opacity").fill("0")
    assert share(pixels(page), LIVER.colour).sum() < 50


def test_planes_and_slices_follow_mouse_and_keyboard(page: "Page") -> None:
    viewer = opened(page)
    place, canvas = viewer.locator(".place"), viewer.locator("canvas")
    axial, count = (int(part) for part in str(place.text_content()).removeprefix("axial ").split(" / "))
    canvas.press("ArrowUp")
    assert place.text_content() == f"axial {axial + 1} / {count}"
    canvas.press("PageDown")
    assert place.text_content() == f"axial {axial - 4} / {count}"
    canvas.hover()
    page.mouse.wheel(0, -100)
    page.wait_for_function(f"document.querySelector('#case-2 .place').textContent === 'axial {axial - 3} / {count}'")
    viewer.get_by_label("Slice", exact=True).fill("0")
    assert place.text_content() == f"axial 1 / {count}"
    canvas.press("ArrowDown")
    assert place.text_content() == f"axial 1 / {count}"
    viewer.get_by_label("coronal").check()
    assert str(place.text_content()).startswith("coronal ")
    viewer.get_by_label("sagittal").check()
    assert str(place.text_content()).startswith("sagittal ")


def test_the_head_is_up_in_long_planes(browser: "Browser", page: "Page") -> None:
    viewer = opened(page)
    viewer.get_by_label("sagittal").check()
    # Through the liver, which lies in the front: the picture's left, not quite as high as the scan.
    viewer.get_by_label("Slice", exact=True).fill("12")
    rows, columns = np.nonzero(share(pixels(page), LIVER.colour))
    height, width = pixels(page).shape[:2]
    assert columns.max() < width * 0.6
    # The scan has 12 slices of 5 mm below the liver and 10 above, of which 40 mm are shown on either side.
    assert rows.min() == pytest.approx(height * 8 / 34, abs=25)
    assert rows.max() == pytest.approx(height * 26 / 34, abs=25)


def test_everything_can_be_reached_by_keyboard(page: "Page") -> None:
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
        if reached[-1].startswith("case9") and page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    assert reached[0] == "Skip to the cases"
    assert "filter" in reached
    assert "Seconds" in reached
    page.keyboard.press("Enter")
    page.wait_for_selector("#case-2[open] .viewer:not([hidden])")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "CANVAS"


def test_it_fits_a_telephone_and_a_dark_room(browser: "Browser", page_file: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        context = browser.new_context(
            viewport={"width": 360, "height": 740},
            is_mobile=True,
            has_touch=True,
            color_scheme="light" if scheme == "light" else "dark",
        )
        page = context.new_page()
        page.goto(page_file.as_uri())
        opened(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        ground, ink = page.evaluate(
            "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; }"
        )
        grounds.append(ground)
        assert contrast(ground, ink) > 7
        context.close()
    assert grounds[0] != grounds[1]


def test_without_scripts_the_figures_and_previews_are_there(browser: "Browser", page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert names(page) == ["case10", "case9", "bad"]
    page.click("#case-2 summary")
    assert page.locator("#case-2 .viewer").is_hidden()
    assert page.locator("#case-2 img.preview").is_visible()
    context.close()


def contrast(a: str, b: str) -> float:
    """Contrast of two CSS colours by WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
