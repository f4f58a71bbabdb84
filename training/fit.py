"""The training loop: one network, one sample a process, on CPUs or GPUs, stopped and resumed at will."""

import dataclasses
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastorgan.errors import FastorganError
from fastorgan.labels import ORGANS
from fastorgan.networks import DenseVNet, build
from fastorgan.runtime import TorchRuntime, resolve_device
from fastorgan.signals import StopRequest

from .cache import load_cache
from .cases import DataError, split_fold
from .checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from .log import LOG, append
from .losses import entropy_and_dice, focal, foreground_loss
from .narrow_gradients import narrow_gradients
from .optimisers import make_optimiser, set_rate
from .progress import Progress
from .recipes import GENTLE, Recipe, sized
from .sampling import MixedSampler, Sampler, Scan, make_sampler
from .structures import TwoHeads, split_codes, structures_loss
from .world import ALONE, World

LOG_EVERY = 50
SAVE_EVERY_S = 120.0
VALIDATE_PARTS = 12

SIDE_STEP = 8
"""Sides of a crop are multiples of this: the organ net halves them three times."""

LEAST_SIDE = 24
"""Sides of a crop have at least this. 16 would leave the deepest stack a depth of two voxels, where torch 2.13's bf16
convolution on a CPU takes weight gradients from memory that was never written."""


class PlanError(FastorganError):
    """A run is asked for something that makes no sense."""


class DivergedError(FastorganError):
    """A run's gradients are no longer finite numbers."""


@dataclass(frozen=True)
class Plan:
    """What to train, on what, and for how long.

    Attributes:
        network: "organs" or "roi".
        data: the cache folder.
        out: where checkpoint and log go; an unfinished run there is resumed.
        recipe: how.
        variant: of the ROI net, "slim" or "paper".
        steps, minutes: the run's whole length; progress is whichever share is larger. The recipe's own if both None.
            A step has one sample of each process.
        slice_minutes: stop this process after so long, to be resumed later on the same schedule.
        fold: (k, n) leaves out every n-th patient, from the k-th, and validates on them; None trains on all.
        init: checkpoint whose exported weights to start from, or released weights (.safetensors).
        warped: folder of scans of the same patients in other shapes (`training.warp`), to train on as well.
        device: "cpu", "cuda" or "cuda:N".
        seed: of initialisation, order and augmentation.

    Raises:
        PlanError: if a length is not positive, the recipe's size does not suit the network, or the ROI net is to have
            warped scans.
    """

    network: str
    data: Path
    out: Path
    recipe: Recipe
    variant: str = "slim"
    steps: int | None = None
    minutes: float | None = None
    slice_minutes: float | None = None
    fold: tuple[int, int] | None = None
    init: Path | None = None
    warped: Path | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, length in (("steps", self.steps), ("minutes", self.minutes)):
            if length is not None and not length > 0:
                raise PlanError(f"{length} {name}: the length of a run must be positive")
        size = sized(self.recipe.size, self.network)
        if self.warped is not None and self.network != "organs":
            raise PlanError("warped scans are for the organ net; leave out --warped")
        if any(side < LEAST_SIDE or side % SIDE_STEP for side in size):
            shown = " x ".join(map(str, size))
            raise PlanError(f"size {shown}: sides must be multiples of {SIDE_STEP}, from {LEAST_SIDE}")


class Average:
    """Exponential moving average of a network's parameters and running statistics (Polyak)."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards the network's weights; the first steps count more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1.0 - decay)
            else:
                self.state[key].copy_(value)


class Run:
    """One training run; `fit()` goes on until its length, or the slice, is used up.

    Several processes (`world`) each draw their own part of the samples and take every step together; the first of them
    writes the log and the checkpoint. They must see one folder of the run.

    Raises:
        DataError: if there is no cache, every patient is left out, a checkpoint cannot be read, or the folder holds
            another run.
        DeviceError: if there is no such device.
    """

    def __init__(self, plan: Plan, world: World = ALONE):
        self.plan = plan
        self.world = world
        self.device = TorchRuntime(resolve_device(world.device or plan.device, "torch")).device
        torch.manual_seed(plan.seed)
        volumes = load_cache(plan.data, plan.network)
        left_out = split_fold([v.patient for v in volumes], *plan.fold) if plan.fold else set()
        self.left_out = sorted(left_out)
        train = [v for v in volumes if v.patient not in left_out]
        if not train:
            raise DataError(f"{plan.data}: every patient is left out; nothing to train on")
        if plan.warped is not None:
            train += [v for v in load_cache(plan.warped, plan.network) if v.patient not in left_out]
        self.train = [Scan.to_device(v, self.device) for v in train]
        self.held_out = [Scan.to_device(v, self.device) for v in volumes if v.patient in left_out]
        self.variant = plan.variant
        if plan.network == "organs":
            self.variant = "guided" if plan.recipe.guided else "densevnet"
        self.network = build(plan.network, self.variant, plan.recipe.drop).to(self.device)
        # What is trained: the network alone, or with a head that stays behind.
        self.model = self.network
        structures = plan.recipe.structures > 0 and any(volume.has_structures for volume in train)
        if structures and isinstance(self.network, DenseVNet):
            self.model = TwoHeads(self.network).to(self.device)
        # Channels last is the faster layout for both the CPU's and the GPU's convolutions.
        self.model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if self.device.type == "cpu" and not bf16_pays(self.device):
            narrow_gradients(self.model)
        # Weights begin alike in every process, samples do not.
        torch.manual_seed(plan.seed + world.rank)
        self.random = np.random.default_rng([plan.seed, world.rank])
        resuming = (plan.out / CHECKPOINT).is_file()
        if plan.init is not None and not resuming:
            self._take_weights(plan.init)
        self.optimiser = make_optimiser(plan.recipe.optimiser, self.model, plan.recipe.weight_decay)
        self.average = Average(self.network, plan.recipe.average)
        self.size = sized(plan.recipe.size, plan.network)
        self.sampler = self._sampler()
        self.step = 0
        self.seconds = 0.0
        self.order: list[int] = []
        self.steps, self.minutes = self._length()
        plan.out.mkdir(parents=True, exist_ok=True)
        if resuming:
            self._resume()
        self.parallel = world.parallel(self.model)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(self.step / self.steps)
        if self.minutes is not None:
            shares.append(self.seconds / 60 / self.minutes)
        return min(1.0, max(shares))

    def fit(self) -> signal.Signals | None:
        """Train to the end of the run or of the slice; leaves a checkpoint and a line per `LOG_EVERY` steps in the log.

        Returns:
            SIGINT or SIGTERM if it came: the step at hand was finished and the checkpoint written; else None.

        Raises:
            DivergedError: if gradients are not finite; the last checkpoint stays.
        """
        begun = time.monotonic()
        last = saved = 0.0
        sums: dict[str, float] = {}
        count = 0
        validated = int(self.progress * VALIDATE_PARTS)
        leaving = self.progress >= 1.0
        with StopRequest() as stop, Progress(self.plan.network, self.steps, self.step, self.world.first) as bar:
            while not leaving:
                terms = self._train_step()
                # What follows from the clock or a signal must follow in every process.
                now, stopped = self.world.greatest(time.monotonic() - begun, stop.signal or 0)
                self.seconds += now - last
                last = now
                self.step += 1
                count += 1
                for key, value in terms.items():
                    sums[key] = sums.get(key, 0.0) + value
                bar.advance(self.progress, sums.get("loss", 0.0) / count)
                leaving = self.progress >= 1.0 or stopped > 0 or self._slice_used(now)
                if count == LOG_EVERY or leaving:
                    self._log({key: value / count for key, value in sums.items()})
                    sums, count = {}, 0
                part = int(self.progress * VALIDATE_PARTS)
                if part > validated and self.held_out:
                    validated = part
                    self._log(self.validate())
                    (last,) = self.world.greatest(time.monotonic() - begun)
                if now - saved > SAVE_EVERY_S:
                    self._save()
                    saved = now
            self._save()
            (stopped,) = self.world.greatest(stop.signal or 0)
        return signal.Signals(int(stopped)) if stopped else None

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Dice of the averaged weights on the patients left out, in the labels' own box at the training size.

        Each process takes its part of the patients.
        """
        network = build(self.plan.network, self.variant).to(self.device)
        network.load_state_dict(self.exported())
        network.eval().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        scores: dict[str, list[float]] = {}
        exact = make_sampler(self.plan.network, self.size, None, self.random)
        if self.plan.network == "roi":
            for scan in self.held_out[self.world.rank :: self.world.size]:
                image, share = exact.draw(scan)
                found, true = network(image) > 0, share > 0.5
                scores.setdefault("dice_foreground", []).append(_dice(found, true))
        else:
            for scan in self.held_out[self.world.rank :: self.world.size]:
                image, codes = exact.draw(scan)
                found = network(image).argmax(1)
                for organ in ORGANS:
                    true = codes == organ.code
                    if bool(true.any()):
                        scores.setdefault(f"dice_{organ.name}", []).append(_dice(found == organ.code, true))
        every = self.world.gather(scores)
        keys = dict.fromkeys(key for part in every for key in part)
        return {key: float(np.mean([value for part in every for value in part.get(key, ())])) for key in keys}

    def exported(self) -> dict[str, Tensor]:
        """The weights that leave the run: averaged where the recipe says so."""
        return self.average.state if self.plan.recipe.average > 0 else self.network.state_dict()

    def _train_step(self) -> dict[str, float]:
        recipe = self.plan.recipe
        while len(self.order) < self.world.size:
            self.order = self.world.share(self.random.permutation(len(self.train)).tolist()) + self.order
        taken = [self.order.pop() for _ in range(self.world.size)]
        image, target = self.sampler.draw(self.train[taken[self.world.rank]])
        self.network.train()
        rate = recipe.rate * (1.0 - self.progress) ** 0.9 * min(1.0, (self.step + 1) / max(1, recipe.warm_up))
        set_rate(self.optimiser, rate)
        image = image.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16_pays(self.device)):
            # The losses go through whole channels.
            logits, further = self.parallel(image), None
            if isinstance(logits, tuple):
                logits, further = logits
            logits = logits.contiguous()
        if self.plan.network == "roi":
            terms = {"loss": foreground_loss(logits, target)}
        else:
            organs, structures = split_codes(target)
            if recipe.loss == "focal":
                terms = {"loss": focal(logits, organs)}
            else:
                entropy, overlap = entropy_and_dice(logits, organs, recipe.borders)
                terms = {"entropy": entropy, "dice_loss": overlap, "loss": entropy + overlap}
            if further is not None:
                terms["structures"] = structures_loss(further.contiguous(), structures)
        whole = terms["loss"]
        if "structures" in terms:
            whole = whole + recipe.structures * terms["structures"]
        self.model.zero_grad(set_to_none=True)
        whole.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        if not bool(norm.isfinite()):
            raise DivergedError(f"{self.plan.out}: gradients are not finite at step {self.step}; try a lower --rate")
        self.optimiser.step()
        self.world.level_statistics(self.network)
        self.average.update(self.network, self.step)
        return {"rate": rate} | {key: float(value.detach()) for key, value in terms.items()}

    def _slice_used(self, seconds: float) -> bool:
        return self.plan.slice_minutes is not None and seconds / 60 >= self.plan.slice_minutes

    def _sampler(self) -> Sampler:
        recipe = self.plan.recipe
        if self.plan.network == "organs" and recipe.augment == "batchgenerators":
            from .paper_sampling import PaperSampler

            try:
                return PaperSampler(self.size, self.random)
            except ImportError as error:
                raise PlanError("this preset needs batchgenerators: pip install 'fastorgan[train]'") from error
        sampler = make_sampler(self.plan.network, self.size, recipe.augmentation, self.random)
        if not recipe.gently:
            return sampler
        gentle = make_sampler(self.plan.network, self.size, GENTLE, self.random)
        return MixedSampler(sampler, gentle, 1.0 - recipe.gently, self.random)

    def _length(self) -> tuple[int | None, float | None]:
        if self.plan.steps is not None or self.plan.minutes is not None:
            return self.plan.steps, self.plan.minutes
        if self.plan.recipe.epochs is not None:
            return math.ceil(self.plan.recipe.epochs * len(self.train) / self.world.size), None
        return self.plan.recipe.steps, None

    def _save(self) -> None:
        chance = self.world.gather({"random": self.random.bit_generator.state, "torch_random": torch.get_rng_state()})
        if not self.world.first:
            return
        state = {
            "export": self.exported(),
            "network": self.model.state_dict(),
            "average": self.average.state,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "order": self.order,
            **chance[0],
            "other_ranks": chance[1:],
            "recipe": {**dataclasses.asdict(self.plan.recipe)},
            "variant": self.variant,
            "kind": self.plan.network,
            "left_out": self.left_out,
        }
        write_checkpoint(state, self.plan.out / CHECKPOINT)

    def _take_weights(self, checkpoint: Path) -> None:
        if checkpoint.suffix == ".safetensors":
            self._take_released_weights(checkpoint)
            return
        state = read_checkpoint(checkpoint, self.device)
        # The organ net's variants have the same weights.
        if state["kind"] != self.plan.network or (self.plan.network == "roi" and state["variant"] != self.variant):
            raise DataError(f"{checkpoint}: holds the weights of another network")
        self.network.load_state_dict(state["export"])

    def _take_released_weights(self, path: Path) -> None:
        import safetensors.torch

        try:
            state = safetensors.torch.load_file(path)
            missing, strange = self.network.load_state_dict(state, strict=False)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise DataError(f"{path}: cannot be read, or holds the weights of another network") from error
        # Batch norm's step counters are not released.
        if strange or any(not name.endswith("num_batches_tracked") for name in missing):
            raise DataError(f"{path}: holds the weights of another network")

    def _resume(self) -> None:
        state = read_checkpoint(self.plan.out / CHECKPOINT, self.device)
        if state["recipe"]["optimiser"] != self.plan.recipe.optimiser:
            raise DataError(f"{self.plan.out}: holds a run of another preset; choose another --out")
        if (state["kind"], state["variant"]) != (self.plan.network, self.variant):
            raise DataError(f"{self.plan.out}: holds a run of another network; choose another --out")
        if state["network"].keys() != self.model.state_dict().keys():
            raise DataError(f"{self.plan.out}: holds a run with other heads; choose another --out")
        if any(index >= len(self.train) for index in state["order"]):
            raise DataError(f"{self.plan.out}: holds a run on more cases; choose another --out")
        if state.get("left_out", self.left_out) != self.left_out:
            raise DataError(f"{self.plan.out}: holds a run that left other patients out; choose another --out")
        self.model.load_state_dict(state["network"])
        self.average.state = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.order = state["step"], state["seconds"], state["order"]
        chance = [state, *state.get("other_ranks", [])]
        if self.world.rank < len(chance):
            self.random.bit_generator.state = chance[self.world.rank]["random"]
            torch.set_rng_state(chance[self.world.rank]["torch_random"].cpu())
        else:
            # More processes than before: this one begins a source of chance of its own.
            fresh = np.random.default_rng([self.plan.seed, self.world.rank, self.step])
            self.random.bit_generator.state = fresh.bit_generator.state

    def _log(self, values: dict[str, float]) -> None:
        values = self.world.mean(values)
        if not self.world.first:
            return
        append(self.plan.out / LOG, self.step, {"minutes": self.seconds / 60} | values)


def bf16_pays(device: torch.device) -> bool:
    """Whether to train in bf16: on GPUs, and on CPUs with AVX-512.

    On others torch's bf16 convolutions are emulated, and a step takes minutes instead of seconds.
    """
    return device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _dice(a: Tensor, b: Tensor) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0
