"""The log of a run, and its figure."""

from pathlib import Path

import pytest
from PIL import Image

from training.__main__ import main
from training.cases import DataError
from training.curves import draw_curves
from training.log import COLUMNS, LOG, append, read_curves


def make_log(folder: Path, scored: bool = False) -> Path:
    folder.mkdir()
    log = folder / LOG
    append(log, 50, {"minutes": 1.5, "rate": 1e-3, "loss": 0.75})
    if scored:
        append(log, 60, {"dice_liver": 0.5, "dice_spleen": 0.25})
    append(log, 100, {"minutes": 3.0, "rate": 5e-4, "loss": 0.5})
    return log


def test_a_log_has_one_header_and_reads_as_it_was_written(tmp_path: Path) -> None:
    log = make_log(tmp_path / "run", scored=True)
    lines = log.read_text().splitlines()
    assert lines[0].split(",") == list(COLUMNS)
    assert lines[1] == "50,1.5,0.001,0.75,,,,,,,,"
    assert len(lines) == 4
    curves = read_curves(log)
    assert set(curves) == {"loss", "dice_liver", "dice_spleen"}
    assert (curves["loss"].steps, curves["loss"].values) == ([50, 100], [0.75, 0.5])
    assert (curves["dice_spleen"].steps, curves["dice_spleen"].values) == ([60], [0.25])


@pytest.mark.parametrize("text", ["step,minutes\n1,2\n", "step,loss\n", ",".join(COLUMNS) + "\nmany,1,1,1,,,,,,,\n"])
def test_what_is_no_log(text: str, tmp_path: Path) -> None:
    (tmp_path / LOG).write_text(text)
    with pytest.raises(DataError, match=LOG):
        draw_curves([tmp_path / LOG], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_scores_get_a_panel_of_their_own(tmp_path: Path) -> None:
    heights = []
    for name, scored in (("one$_", False), ("two", True)):
        make_log(tmp_path / name, scored)
        assert main(["curves", str(tmp_path / name), "--out", str(tmp_path / "curves.png")]) == 0
        with Image.open(tmp_path / "curves.png") as picture:
            picture.verify()
            heights.append(picture.height)
    assert heights[1] == 2 * heights[0]


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_log(tmp_path / "run")
    for run, out in ((tmp_path / "none", tmp_path / "a.png"), (tmp_path / "run", tmp_path / "none" / "a.png")):
        assert main(["curves", str(run), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("training: ")
        assert "none" in line
