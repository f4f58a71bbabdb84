"""Work on several items at a time and hand the results on in order."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self, TypeVar

from .signals import uninterrupted

Item = TypeVar("Item")
Result = TypeVar("Result")


class InOrder(Generic[Item, Result]):
    """Threads that begin on the items as soon as the `with` block does; iterating yields the results in order.

    Whatever ends the block, an interrupt say, lets the items under way come to their end and begins no other. What
    `work` raises is raised where its result would have been yielded, and no further item is begun either.

    Args:
        work: done once for each item, in a thread of its own.
        items: in the order in which they are begun.
        at_once: how many are worked on at a time, at most.
    """

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item], at_once: int) -> None:
        self._work = work
        self._items = items
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="fastorgan-case")
        self._halted = False
        self._ended: dict[int, Future[Result]] = {}
        # One for each item that ended. Whoever waits for a future may be interrupted while its lock is his, and then
        # its thread never comes to its end; this queue has no lock that could be kept.
        self._ends: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> Self:
        with uninterrupted():
            for number, item in enumerate(self._items):
                self._pool.submit(self._do, number, item)
        return self

    def __iter__(self) -> Iterator[Result]:
        for number in range(len(self._items)):
            while number not in self._ended:
                self._ends.get()
            yield self._ended[number].result()

    def ended(self) -> list[Result]:
        """After the block: results of the items that came to their end, yielded or not, in order."""
        ended = [self._ended[number] for number in sorted(self._ended)]
        return [future.result() for future in ended if future.exception() is None]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._halted = True
        self._pool.shutdown(cancel_futures=True)

    def _do(self, number: int, item: Item) -> None:
        # The pool would go on while the one who iterates has not yet met the error.
        if self._halted:
            return
        outcome: Future[Result] = Future()
        try:
            outcome.set_result(self._work(item))
        except BaseException as error:
            self._halted = True
            outcome.set_exception(error)
        self._ended[number] = outcome
        self._ends.put(None)
