"""The processes that train one network together, as `torchrun` starts them; alone, one process needs none of this."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from fastorgan.errors import DeviceError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others before it gives up."""


@dataclass(frozen=True)
class World:
    """This process among those of its run.

    Every method but `first` is a meeting: all processes must call it, in the same order, or all wait.

    Attributes:
        rank: this process' number, from 0; rank 0 writes the log and the checkpoint.
        size: how many processes there are.
        device: that this process trains on, where the launcher decides it; else None.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """What each process gives, in the order of their ranks."""
        if self.size == 1:
            return [mine]
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, mine)
        return every

    def share(self, mine: T) -> T:
        """What rank 0 gives."""
        return self.gather(mine)[0]

    def greatest(self, *mine: float) -> tuple[float, ...]:
        """The greatest of what the processes give, number by number."""
        if self.size == 1:
            return mine
        numbers = torch.tensor(mine, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        return tuple(numbers.tolist())

    def mean(self, mine: dict[str, float]) -> dict[str, float]:
        """The mean of each value over the processes that have it."""
        every = self.gather(mine)
        keys = dict.fromkeys(key for values in every for key in values)
        found = {key: [values[key] for values in every if key in values] for key in keys}
        return {key: sum(values) / len(values) for key, values in found.items()}

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network with rank 0's weights in every process, and gradients that are averaged over the processes."""
        if self.size == 1:
            return network
        return nn.parallel.DistributedDataParallel(network)

    @torch.no_grad()
    def level_statistics(self, network: nn.Module) -> None:
        """Average the batch norms' running statistics, which each process has gathered from its own samples."""
        if self.size == 1:
            return
        statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        together = torch.cat([buffer.flatten() for buffer in statistics])
        torch.distributed.all_reduce(together)
        together /= self.size
        first = 0
        for buffer in statistics:
            buffer.copy_(together[first : first + buffer.numel()].view_as(buffer))
            first += buffer.numel()


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Meet the other processes that `torchrun` started, by NCCL on GPUs and by gloo on CPUs; alone, do nothing.

    What `World.parallel` returned must be let go within the block: it keeps threads of gloo's alive that, left to the
    interpreter's end, may abort the process.

    Args:
        device: "cpu"; or "cuda", of which each process takes the card that has its number on its machine.

    Raises:
        DeviceError: if one card is named for all processes, or there is none for this one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    # Started by torchrun alone: schedulers set WORLD_SIZE too.
    if size == 1 or not torch.distributed.is_torchelastic_launched():
        yield ALONE
        return
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise DeviceError(f"there are {torch.cuda.device_count()} GPUs for {local + 1} processes on this machine")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    elif device != "cpu":
        raise DeviceError(f"{device}: several processes cannot share it; give --device cuda or cpu")
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl", timeout=PATIENCE)
    try:
        yield World(torch.distributed.get_rank(), size, device)
    finally:
        # Those networks hang in circles of references.
        gc.collect()
        torch.distributed.destroy_process_group()
