"""A progress line with the time to go, on a terminal; a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType


class Progress:
    """Reports how far a run is; `tqdm` is not needed, so that `fit` runs with torch and numpy alone.

    Args:
        name: of the run.
        steps: the whole run's, if it has a fixed number.
        done: steps of earlier slices.
        shown: whether anything is said at all.
    """

    EVERY_S = (0.5, 60.0)  # on a terminal, elsewhere

    def __init__(self, name: str, steps: int | None, done: int, shown: bool = True):
        self.name = name
        self.steps = steps
        self.step = done
        self.silent = not shown
        self.terminal = shown and sys.stderr.isatty()
        self.begun: tuple[float, float] | None = None
        self.shown = 0.0

    def __enter__(self) -> "Progress":
        return self

    def advance(self, share: float, loss: float) -> None:
        """Count one step; `share` of the whole run is done."""
        self.step += 1
        now = time.monotonic()
        if self.begun is None:
            self.begun = (now, share)
        if self.silent or (share < 1.0 and now - self.shown < self.EVERY_S[0 if self.terminal else 1]):
            return
        self.shown = now
        since, first = self.begun
        gained = share - first
        left = f"{(now - since) / gained * (1 - share) / 60:.0f} min left" if gained > 0 else ""
        of = f"/{self.steps}" if self.steps else ""
        line = f"{self.name}: step {self.step}{of}, {share:.1%}, loss {loss:.4f} {left}"
        if self.terminal:
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal:
            print(file=sys.stderr)
