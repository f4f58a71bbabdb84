import io
import subprocess
import sys
from pathlib import Path

import pytest

from fastorgan.console import printable, say
from fastorgan.errors import VolumeError


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name-1.nii.gz", "plain name-1.nii.gz"),
        ("größe 腹部 ½", "größe 腹部 ½"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u202egnp", r"\u202egnp"),
        ("not text \udcff", r"not text \udcff"),
        ("", ""),
    ],
)
def test_names_are_shown_on_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert str(VolumeError(f"{name}: no such file")) == f"{shown}: no such file"


def test_a_line_goes_out_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    say("one")
    say("two", sys.stderr)
    assert capsys.readouterr() == ("one\n", "two\n")


def test_nothing_comes_between_a_line_and_its_end() -> None:
    pieces = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    say("a\nb", Stream())
    assert pieces == ["a\\nb\n"]


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from fastorgan.console import say\nfor n in range(100000): say(str(n))\nimport sys; sys.exit(7)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1] / "app",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 7
    assert errors == ""
