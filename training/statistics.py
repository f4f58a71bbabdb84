"""Batch norm's statistics, measured anew for weights that leave a run."""

from collections.abc import Container
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .cache import load_cache
from .cases import DataError
from .fit import bf16_pays
from .recipes import GENTLE
from .sampling import Scan, make_sampler

DRAWS = 2
"""Samples of each scan."""


@torch.no_grad()
def measure_statistics(
    module: nn.Module, network: str, size: tuple[int, int, int], cache: Path, left_out: Container[str] = ()
) -> None:
    """Set batch norm's running statistics to their mean over samples of a cache, disturbed gently (`recipes.GENTLE`).

    What a run gathers is of strongly disturbed samples, and of weights that it had on its way; a mean of weights never
    had any of its own (Izmailov et al., Averaging weights leads to wider optima, UAI 2018, section 3.2).

    Args:
        module: in evaluation, with weights; its statistics are changed.
        network: "organs" or "roi", which `module` is.
        size: of the samples (z, y, x).
        cache: the folder.
        left_out: patients whose scans are not looked at.

    Raises:
        DataError: if there is no cache, or every patient is left out.
    """
    device = next(module.parameters()).device
    scans = [Scan.to_device(v, device) for v in load_cache(cache, network) if v.patient not in left_out]
    if not scans:
        raise DataError(f"{cache}: every patient is left out; there is nothing to measure statistics on")
    chance = np.random.default_rng(0)
    sampler = make_sampler(network, size, GENTLE, chance)
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm3d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        # A plain mean over all that comes.
        norm.momentum = None
    with torch.random.fork_rng(), torch.autocast(device.type, torch.bfloat16, enabled=bf16_pays(device)):
        torch.manual_seed(0)
        for scan in scans * DRAWS:
            module(sampler.draw(scan)[0].contiguous(memory_format=torch.channels_last_3d))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
