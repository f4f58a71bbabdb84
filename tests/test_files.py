import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastorgan.files import remove_abandoned, whole_file


def test_a_new_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with whole_file(target, ".txt") as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path
        assert partial.name.endswith(".txt")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write_half() -> None:
        with whole_file(target, ".txt") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.txt", ".txt"):
        pass


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a.txt", ".txt") as partial:
            partial.write_text("new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a", "") as first, whole_file(tmp_path / "a", "") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    # The inner block ends first, the outer one last.
    assert (tmp_path / "a").read_text() == "1"


def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    (tmp_path / "a.txt").symlink_to(secret)
    with whole_file(tmp_path / "a.txt", ".txt") as partial:
        partial.write_text("new")
    assert not (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert secret.read_text() == "kept"


WRITER = """
import sys, time
from pathlib import Path
from fastorgan.files import whole_file

with whole_file(Path(sys.argv[1]), ".txt") as partial:
    partial.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / ".hidden").write_text("kept")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            remove_abandoned(tmp_path)
            assert len(list(tmp_path.glob(".fastorgan-*"))) == 1, "taken from a process that is writing"
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob(".fastorgan-*"))) == 1
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_no_folder_has_nothing_abandoned(tmp_path: Path) -> None:
    remove_abandoned(tmp_path / "none")
