"""Work on several items at a time and hand the results on in order."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

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
        self._halted = threading.Event()
        self._futures: list[Future[Result]] = []
        self._yielded = 0

    def __enter__(self) -> Self:
        self._futures = [self._pool.submit(self._do, item) for item in self._items]
        return self

    def __iter__(self) -> Iterator[Result]:
        while self._yielded < len(self._futures):
            result = self._futures[self._yielded].result()
            self._yielded += 1
            yield result

    def left(self) -> list[Result]:
        """After the block: results of items that came to their end but were not yielded, in order."""
        ended = [future for future in self._futures[self._yielded :] if future.done() and not future.cancelled()]
        return [future.result() for future in ended if future.exception() is None]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._halted.set()
        self._pool.shutdown(cancel_futures=True)

    def _do(self, item: Item) -> Result:
        # The pool would go on while the one who iterates has not yet met the error.
        if self._halted.is_set():
            raise CancelledError
        try:
            return self._work(item)
        except BaseException:
            self._halted.set()
            raise
