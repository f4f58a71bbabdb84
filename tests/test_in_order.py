"""`fastorgan.in_order`."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastorgan.in_order import InOrder


def test_results_come_in_the_order_of_the_items() -> None:
    last_done = threading.Event()

    def work(item: int) -> int:
        # The first comes to its end after the last.
        if item == 0:
            assert last_done.wait(20)
        if item == 4:
            last_done.set()
        return item * item

    with InOrder(work, range(5), 2) as results:
        assert list(results) == [0, 1, 4, 9, 16]


def test_no_more_than_asked_for_are_worked_on_at_a_time() -> None:
    lock = threading.Lock()
    both = threading.Event()
    busy = [0]
    most: list[int] = []

    def work(item: int) -> None:
        with lock:
            busy[0] += 1
            most.append(busy[0])
            if busy[0] == 3:
                both.set()
        assert both.wait(20)
        with lock:
            busy[0] -= 1

    with InOrder(work, range(30), 3) as results:
        list(results)
    assert max(most) == 3


def test_work_begins_before_anybody_asks() -> None:
    begun = threading.Event()
    with InOrder(lambda item: begun.set(), [0], 1):
        assert begun.wait(20)


def test_nothing_to_do_is_no_result() -> None:
    nothing: list[int] = []
    with InOrder(str, nothing, 1) as results:
        assert list(results) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_comes_in_its_turn_and_nothing_is_begun_after_it(error: type[BaseException]) -> None:
    begun: list[int] = []
    got: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise error
        return item

    def take() -> Iterator[int]:
        with InOrder(work, range(9), 1) as results:
            yield from results

    with pytest.raises(error):
        got.extend(take())
    assert begun == [0, 1]
    assert got == [0]


def test_leaving_early_waits_for_what_is_under_way_and_begins_no_more() -> None:
    begun, leave = threading.Event(), threading.Event()
    ended: list[int] = []

    def work(item: int) -> None:
        begun.set()
        assert leave.wait(20)
        ended.append(item)

    def interrupted() -> None:
        with InOrder(work, range(9), 1):
            assert begun.wait(20)
            threading.Timer(0.1, leave.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ended == [0]


def test_what_ended_is_there_after_the_block_in_order_yielded_or_not() -> None:
    begun = threading.Event()

    def work(item: int) -> int:
        if item == 2:
            begun.set()
        if item == 3:
            raise ValueError(item)
        return item

    results = InOrder(work, range(5), 1)

    def look_once() -> None:
        with results:
            assert next(iter(results)) == 0
            assert begun.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_once()
    assert results.ended() in ([0, 1, 2], [0, 1])


# SIGTERM at the N-th moment at which the main thread has a lock and is not yet in the block that gives it back.
LOCKS = """
import faulthandler, signal, sys, threading

from fastorgan.in_order import InOrder
from fastorgan.signals import Terminated, terminable

faulthandler.dump_traceback_later(30, exit=True)
enter, count = threading.Condition.__enter__, 0


def enter_and_hear(condition):
    global count
    held = enter(condition)
    if threading.get_ident() == threading.main_thread().ident:
        count += 1
        if count == moment:
            signal.raise_signal(signal.SIGTERM)
    return held


threading.Condition.__enter__ = enter_and_hear
for moment in range(1, 40):
    count = 0
    try:
        with terminable(), InOrder(threading.Event().wait, [0.01] * 4, 2) as results:
            assert list(results) == [False] * 4
    except Terminated:
        pass
    if count < moment:
        break
print(moment)
"""


def test_a_signal_beside_a_lock_hangs_no_thread() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "app")}
    run = [sys.executable, "-c", LOCKS]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    # All moments that there are were tried, and there are some.
    assert 1 < int(done.stdout) < 39
