import contextlib
import csv
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from fastorgan.errors import DeviceError
from fastorgan.networks import DenseVNet, RoiUNet, SlimRoiUNet
from fastorgan.networks.blocks import parameter_count
from tests.child_process import ended
from tests.synthetic_cache import one_thread, write_cache
from training import fit
from training.cache import CachedVolume, load_cache
from training.cases import DataError
from training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from training.fit import Average, DivergedError, Plan, PlanError, Run, bf16_pays
from training.log import LOG
from training.progress import Progress
from training.recipes import GENTLE, PRESETS, Recipe
from training.sampling import MixedSampler, OrganSampler, Scan

RELEASED = Path(__file__).parents[1] / "weights"

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

LIGHT = replace(PRESETS["light"], size=(24, 24, 32))
PAPER = replace(PRESETS["paper"], size=(24, 24, 32))


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def organs(cache: Path, out: Path, recipe: Recipe = LIGHT, **changes: Any) -> Plan:
    return Plan("organs", cache, out, recipe, **changes)


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / LOG).open(newline="") as stream:
        return list(csv.DictReader(stream))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Both are equal to the last bit, whatever they are made of."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """Both folders hold the same checkpoint but for the time that the runs took."""
    states = [read_checkpoint(folder / CHECKPOINT, CPU) for folder in (a, b)]
    for state in states:
        assert state.pop("seconds") > 0
    assert_same(states[0], states[1])


# Learning


def test_the_loss_falls(cache: Path, tmp_path: Path) -> None:
    run = Run(organs(cache, tmp_path, replace(LIGHT, warm_up=0), steps=30))
    losses = []

    def note(step: Any = run._train_step) -> dict[str, float]:
        terms: dict[str, float] = step()
        losses.append(terms["loss"])
        return terms

    run._train_step = note  # type: ignore[method-assign]
    run.fit()
    assert len(losses) == 30
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_a_run_leaves_a_checkpoint_and_a_log(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "organs"
    assert Run(organs(cache, out, steps=3)).fit() is None
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINT, LOG]
    state = read_checkpoint(out / CHECKPOINT, CPU)
    assert (state["kind"], state["step"], state["recipe"]["optimiser"]) == ("organs", 3, "muon")
    assert 0 < state["seconds"] < 60
    (row,) = read_log(out)
    assert row["step"] == "3"
    assert float(row["loss"]) == pytest.approx(float(row["entropy"]) + float(row["dice_loss"]), rel=1e-4)
    assert row["dice_liver"] == ""


def test_a_log_line_is_the_mean_over_fifty_steps(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "LOG_EVERY", 2)
    run = Run(organs(cache, tmp_path, steps=5))
    numbers = iter([1.0, 2.0, 3.0, 5.0, 7.0])
    run._train_step = lambda: {"loss": next(numbers)}  # type: ignore[method-assign]
    run.fit()
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [("2", "1.5"), ("4", "4"), ("5", "7")]


def test_the_rate_warms_up_and_decays(cache: Path, tmp_path: Path) -> None:
    run = Run(organs(cache, tmp_path, replace(LIGHT, warm_up=2), steps=4))
    rates = []
    for _ in range(4):
        rates.append(run._train_step()["rate"])
        assert run.optimiser.param_groups[0]["lr"] == rates[-1]
        run.step += 1
    assert rates == pytest.approx([2e-3 * (1 - k / 4) ** 0.9 * min(1, (k + 1) / 2) for k in range(4)])


def test_every_case_is_seen_once_before_any_is_seen_again(cache: Path, tmp_path: Path) -> None:
    run = Run(organs(cache, tmp_path, steps=6))
    seen = []
    draw = run.sampler.draw

    def note(scan: Scan) -> Any:
        seen.append(scan.source.name)
        return draw(scan)

    run.sampler.draw = note  # type: ignore[method-assign]
    run.fit()
    assert sorted(seen[:3]) == sorted(seen[3:]) == ["case0", "case1", "case2"]


def test_the_average_by_hand() -> None:
    network = torch.nn.BatchNorm3d(1)
    average = Average(network, decay=0.9)
    network.weight.data.fill_(2.0)
    network.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    # The first step's decay is 1 / 10: of the old 1 a tenth is left.
    average.update(network, 0)
    assert float(average.state["weight"]) == pytest.approx(0.1 * 1 + 0.9 * 2)
    assert int(average.state["num_batches_tracked"]) == 7
    average.update(network, 10_000)
    assert float(average.state["weight"]) == pytest.approx(0.9 * 1.9 + 0.1 * 2)


def test_what_is_exported_is_the_average(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path, steps=3)).fit()
    state = read_checkpoint(tmp_path / CHECKPOINT, CPU)
    assert_same(state["export"], state["average"])
    assert not torch.equal(state["export"]["classify.weight"], state["network"]["classify.weight"])


def test_a_seed_decides_the_run(cache: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        Run(organs(cache, tmp_path / name, steps=2, seed=seed)).fit()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    first, other = (read_checkpoint(tmp_path / name / CHECKPOINT, CPU)["export"] for name in "ac")
    assert not torch.equal(first["classify.weight"], other["classify.weight"])


# Stopped and resumed


def restart_as_new_process(plan: Plan) -> Run:
    """A run made after the global sources of chance were left in some other state."""
    torch.manual_seed(1234)
    np.random.seed(1234)  # noqa: NPY002  batchgenerators' source of chance
    return Run(plan)


def slice_by_slice(plan: Plan) -> int:
    """Run to the end in slices of one step; returns their number."""
    for count in range(100):
        run = restart_as_new_process(replace(plan, slice_minutes=1e-9))
        if run.progress >= 1.0:
            return count
        step = run.step
        assert run.fit() is None
        assert run.step == step + 1
    raise AssertionError("the run does not end")


@pytest.mark.parametrize("fold", [None, (1, 3)])
def test_a_run_in_slices_is_the_same_run(cache: Path, tmp_path: Path, fold: tuple[int, int] | None) -> None:
    plan = organs(cache, tmp_path / "whole", steps=5, fold=fold)
    restart_as_new_process(plan).fit()
    sliced = replace(plan, out=tmp_path / "sliced")
    assert slice_by_slice(sliced) == 5
    assert_same_run(plan.out, sliced.out)


def test_a_run_of_the_papers_preset_in_slices_is_the_same_run(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("batchgenerators", reason="the paper's augmentation comes from batchgenerators")
    plan = organs(cache, tmp_path / "whole", PAPER, steps=5)
    restart_as_new_process(plan).fit()
    sliced = replace(plan, out=tmp_path / "sliced")
    assert slice_by_slice(sliced) == 5
    assert_same_run(plan.out, sliced.out)


@pytest.mark.slow
def test_a_roi_run_in_slices_is_the_same_run(cache: Path, tmp_path: Path) -> None:
    plan = Plan("roi", cache, tmp_path / "whole", PRESETS["light"], steps=3, fold=(0, 3))
    restart_as_new_process(plan).fit()
    sliced = replace(plan, out=tmp_path / "sliced")
    assert slice_by_slice(sliced) == 3
    assert_same_run(plan.out, sliced.out)
    assert all(0 <= float(row["dice_foreground"]) <= 1 for row in read_log(plan.out) if row["dice_foreground"])


def test_a_run_that_is_done_stays_as_it_is(cache: Path, tmp_path: Path) -> None:
    plan = organs(cache, tmp_path, steps=2)
    Run(plan).fit()
    before = read_checkpoint(tmp_path / CHECKPOINT, CPU)
    run = Run(plan)
    assert run.progress == 1.0
    assert run.fit() is None
    assert_same(before, read_checkpoint(tmp_path / CHECKPOINT, CPU))


def test_warped_scans_are_trained_on_but_those_of_patients_left_out(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "warped").mkdir()
    for volume in load_cache(cache, "organs"):
        warped = replace(volume, name=f"{volume.name}.shape")
        warped.save(tmp_path / "warped" / f"{warped.name}.organs.npz")
    run = Run(organs(cache, tmp_path / "run", warped=tmp_path / "warped", fold=(1, 3)))
    assert [scan.source.name for scan in run.train] == ["case0", "case2", "case0.shape", "case2.shape"]
    assert [scan.source.name for scan in run.held_out] == ["case1"]


def test_a_folder_without_warped_scans_is_said(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.organs\.npz files"):
        Run(organs(cache, tmp_path / "run", warped=tmp_path))


def test_the_roi_net_takes_no_warped_scans(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"warped scans are for the organ net; leave out --warped\Z"):
        Plan("roi", cache, tmp_path, LIGHT, warped=cache)


@pytest.fixture(scope="module")
def marked_cache(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache with a stomach beside the organs."""
    folder = tmp_path_factory.mktemp("marked")
    for path in cache.glob("*.organs.npz"):
        volume = CachedVolume.load(path)
        labels = volume.labels.copy()
        labels[8:14, 10:16, 18:22][labels[8:14, 10:16, 18:22] == 0] = 11
        assert (labels == 11).sum() > 50
        replace(volume, labels=labels).save(folder / path.name)
    return folder


def test_structures_are_learnt_beside_the_organs_and_not_exported(marked_cache: Path, tmp_path: Path) -> None:
    run = Run(organs(marked_cache, tmp_path, replace(LIGHT, warm_up=0), steps=30))
    terms = []

    def note(step: Any = run._train_step) -> dict[str, float]:
        terms.append(step())
        return terms[-1]  # type: ignore[no-any-return]

    run._train_step = note  # type: ignore[method-assign]
    run.fit()
    learnt = [step["structures"] for step in terms]
    assert np.mean(learnt[-5:]) < 0.8 * np.mean(learnt[:3])
    assert terms[0]["loss"] == pytest.approx(terms[0]["entropy"] + terms[0]["dice_loss"], rel=1e-4)
    assert [float(row["structures"]) > 0 for row in read_log(tmp_path)] == [True]
    state = read_checkpoint(tmp_path / CHECKPOINT, CPU)
    assert state["export"].keys() == DenseVNet().state_dict().keys()
    assert {key for key in state["network"] if key.startswith("head.")} == {"head.weight", "head.bias"}


def test_a_run_with_structures_in_slices_is_the_same_run(marked_cache: Path, tmp_path: Path) -> None:
    plan = organs(marked_cache, tmp_path / "whole", steps=4)
    restart_as_new_process(plan).fit()
    sliced = replace(plan, out=tmp_path / "sliced")
    assert slice_by_slice(sliced) == 4
    assert_same_run(plan.out, sliced.out)


def test_structures_can_be_left_out(marked_cache: Path, tmp_path: Path) -> None:
    plain = replace(LIGHT, structures=0.0)
    Run(organs(marked_cache, tmp_path, plain, steps=1)).fit()
    assert read_log(tmp_path)[0]["structures"] == ""
    with pytest.raises(DataError, match="other heads; choose another --out"):
        Run(organs(marked_cache, tmp_path, steps=2))


def test_the_papers_preset_trains_on_a_cache_with_structures(marked_cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("batchgenerators")
    run = Run(organs(marked_cache, tmp_path, PAPER, steps=1))
    run.fit()
    assert float(read_log(tmp_path)[0]["loss"]) > 0


def test_a_longer_run_goes_on_from_a_shorter_one(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path, steps=2)).fit()
    run = Run(organs(cache, tmp_path, steps=3))
    assert run.progress == pytest.approx(2 / 3)
    run.fit()
    assert run.step == 3


@contextlib.contextmanager
def signal_at(run: Run, step: int, number: signal.Signals) -> Iterator[None]:
    """Send this process a signal amid a step."""
    draw = run.sampler.draw

    def interrupted(scan: Scan) -> Any:
        if run.step == step:
            os.kill(os.getpid(), number)
        return draw(scan)

    run.sampler.draw = interrupted  # type: ignore[method-assign]
    yield


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_the_step_at_hand(cache: Path, tmp_path: Path, number: signal.Signals) -> None:
    plan = organs(cache, tmp_path / "whole", steps=5, fold=(0, 3))
    Run(plan).fit()
    stopped = replace(plan, out=tmp_path / "stopped")
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run = Run(stopped)
    with signal_at(run, 2, number):
        assert run.fit() is number
    assert run.step == 3
    assert read_checkpoint(stopped.out / CHECKPOINT, CPU)["step"] == 3
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert restart_as_new_process(stopped).fit() is None
    assert_same_run(plan.out, stopped.out)


def test_a_second_ctrl_c_ends_a_run_at_once(cache: Path, tmp_path: Path) -> None:
    run = Run(organs(cache, tmp_path, steps=50))
    draw = run.sampler.draw

    def impatient(scan: Scan) -> Any:
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return draw(scan)

    run.sampler.draw = impatient  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert run.step == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_can_be_made_in_another_thread(cache: Path, tmp_path: Path) -> None:
    run = Run(organs(cache, tmp_path, steps=1))
    thread = threading.Thread(target=run.fit)
    thread.start()
    thread.join()
    assert run.step == 1
    assert (tmp_path / CHECKPOINT).is_file()


def test_a_signal_that_the_process_ignores_stays_ignored(cache: Path, tmp_path: Path) -> None:
    run = Run(organs(cache, tmp_path, steps=2))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signal_at(run, 0, signal.SIGINT):
            assert run.fit() is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.step == 2


# Length


def test_steps_and_minutes_share_one_schedule(cache: Path, tmp_path: Path) -> None:
    run = Run(organs(cache, tmp_path, steps=10, minutes=2.0))
    assert run.progress == 0.0
    run.step, run.seconds = 4, 30.0
    assert run.progress == pytest.approx(0.4)
    run.seconds = 90.0
    assert run.progress == pytest.approx(0.75)
    run.seconds = 1000.0
    assert run.progress == 1.0


def test_minutes_count_over_all_slices(cache: Path, tmp_path: Path) -> None:
    plan = organs(cache, tmp_path, minutes=0.05)
    first = Run(replace(plan, slice_minutes=1e-9))
    first.fit()
    assert first.step == 1
    assert 0 < first.progress < 1
    second = Run(plan)
    assert second.seconds == first.seconds
    begun = time.monotonic()
    second.fit()
    assert second.progress == 1.0
    assert second.step > 1
    assert time.monotonic() - begun < 30


def test_without_a_length_the_recipes_own_counts(cache: Path, tmp_path: Path) -> None:
    light = Run(organs(cache, tmp_path / "light"))
    assert (light.steps, light.minutes) == (12_000, None)
    paper = Run(organs(cache, tmp_path / "paper", replace(PAPER, augment="torch"), fold=(0, 3)))
    # 600 epochs over the two patients that are not left out.
    assert (paper.steps, paper.minutes) == (1200, None)
    timed = Run(organs(cache, tmp_path / "timed", minutes=3.0))
    assert (timed.steps, timed.minutes) == (None, 3.0)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"steps": -3}, {"minutes": 0.0}, {"minutes": float("nan")}])
def test_a_length_that_is_none_is_refused(cache: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="must be positive"):
        organs(cache, tmp_path, **changes)


@pytest.mark.parametrize("size", [(96, 128, 100), (16, 24, 24), (24, 24, 0)])
def test_a_size_that_does_not_suit_the_network_is_refused(
    cache: Path, tmp_path: Path, size: tuple[int, int, int]
) -> None:
    with pytest.raises(PlanError, match="multiples of 8, from 24"):
        organs(cache, tmp_path, replace(LIGHT, size=size))


# Folds


def test_a_fold_leaves_out_whole_patients(tmp_path: Path) -> None:
    data = write_cache(tmp_path / "cache", ("hcc1", "b", "hcc1", "c"))
    run = Run(organs(data, tmp_path / "run", steps=2, fold=(2, 3)))
    assert [scan.source.name for scan in run.held_out] == ["case0", "case2"]
    assert [scan.source.name for scan in run.train] == ["case1", "case3"]
    run.fit()
    validated = [row for row in read_log(tmp_path / "run") if row["dice_liver"]]
    assert [row["step"] for row in validated] == ["1", "2"]
    for row in validated:
        assert all(0 <= float(row[f"dice_{organ}"]) <= 1 for organ in ("liver", "kidney", "spleen", "pancreas"))
        assert row["dice_foreground"] == ""


def test_without_a_fold_all_are_trained_on(cache: Path, tmp_path: Path) -> None:
    run = Run(organs(cache, tmp_path, steps=1))
    assert len(run.train) == 3
    assert not run.held_out


def test_a_fold_of_one_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every patient is left out"):
        Run(organs(cache, tmp_path, steps=1, fold=(0, 1)))


def test_a_perfect_network_validates_at_one(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(organs(cache, tmp_path, replace(LIGHT, size=(48, 64, 96)), steps=1, fold=(0, 3)))

    class Oracle(torch.nn.Module):
        """Tells organs by their grey value."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            levels = torch.tensor([90.0, 140.0, 170.0, 200.0, 230.0])
            return -((x + 1) / 2 * 255 - levels[:, None, None, None]).abs()

        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            return None

    monkeypatch.setattr(fit, "build", lambda *_: Oracle())
    scores = run.validate()
    # Noise of 8 levels and blurred borders cost little of a large organ.
    assert scores["dice_liver"] > 0.9
    assert scores["dice_kidney"] > 0.6


# What is refused


def test_a_run_that_diverges_ends_and_keeps_its_checkpoint(cache: Path, tmp_path: Path) -> None:
    plan = organs(cache, tmp_path, steps=4)
    Run(replace(plan, slice_minutes=1e-9)).fit()
    before = (tmp_path / CHECKPOINT).read_bytes()
    run = Run(plan)
    with torch.no_grad():
        next(run.network.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="gradients are not finite at step 1; try a lower --rate"):
        run.fit()
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_another_networks_run_is_not_resumed(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path, steps=1)).fit()
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(DataError, match="holds a run of another network; choose another --out") as caught:
        Run(Plan("roi", cache, tmp_path, LIGHT, steps=1))
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_another_variants_run_is_not_resumed(cache: Path, tmp_path: Path) -> None:
    state = {"kind": "roi", "variant": "slim", "export": {}, "recipe": asdict(LIGHT)}
    write_checkpoint(state, tmp_path / CHECKPOINT)
    with pytest.raises(DataError, match="another network"):
        Run(Plan("roi", cache, tmp_path, LIGHT, variant="paper", steps=1))


def test_a_run_whose_logits_were_enlarged_otherwise_is_not_resumed(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path, replace(LIGHT, guided=False), steps=1)).fit()
    with pytest.raises(DataError, match="another network"):
        Run(organs(cache, tmp_path, LIGHT, steps=1))


def test_another_presets_run_is_not_resumed(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path, steps=1)).fit()
    with pytest.raises(DataError, match="another preset"):
        Run(organs(cache, tmp_path, replace(PAPER, augment="torch"), steps=1))


def test_a_run_on_more_cases_is_not_resumed(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path / "run", steps=4)).fit()
    state = read_checkpoint(tmp_path / "run" / CHECKPOINT, CPU)
    state["order"] = [2, 0]
    write_checkpoint(state, tmp_path / "run" / CHECKPOINT)
    smaller = write_cache(tmp_path / "cache", ("p0", "p1"))
    with pytest.raises(DataError, match="on more cases"):
        Run(organs(smaller, tmp_path / "run", steps=5))


def test_a_run_that_left_other_patients_out_is_not_resumed(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path, steps=1, fold=(0, 3))).fit()
    assert read_checkpoint(tmp_path / CHECKPOINT, CPU)["left_out"] == ["p0"]
    with pytest.raises(DataError, match="left other patients out"):
        Run(organs(cache, tmp_path, steps=2, fold=(1, 3)))


def test_a_damaged_checkpoint_is_named(cache: Path, tmp_path: Path) -> None:
    plan = organs(cache, tmp_path, steps=1)
    Run(plan).fit()
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"checkpoint\.pt: damaged, or not a checkpoint") as caught:
            Run(plan)
        assert "\n" not in str(caught.value)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="not a checkpoint"):
        Run(plan)


def test_a_device_that_is_not_there_is_refused(cache: Path, tmp_path: Path) -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(DeviceError, match=device):
            Run(organs(cache, tmp_path, steps=1, device=device))


def test_a_checkpoint_stays_whole_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / CHECKPOINT
    write_checkpoint({"kind": "roi", "variant": "slim", "export": {}, "step": 1}, path)

    def fail(state: Any, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint({"step": 2}, path)
    assert read_checkpoint(path, CPU)["step"] == 1


# Where weights come from


def test_a_run_starts_from_given_weights(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path / "half", steps=2)).fit()
    given = read_checkpoint(tmp_path / "half" / CHECKPOINT, CPU)["export"]
    plan = organs(cache, tmp_path / "full", replace(LIGHT, size=(32, 24, 24)), steps=2)
    plan = replace(plan, init=tmp_path / "half" / CHECKPOINT)
    run = Run(plan)
    assert_same(dict(run.network.state_dict()), dict(given))
    assert_same(dict(run.average.state), dict(given))
    assert run.step == 0
    run.fit()
    # Resumed, it needs them no more.
    (tmp_path / "half" / CHECKPOINT).unlink()
    assert Run(plan).step == 2


def test_weights_of_another_network_are_refused(cache: Path, tmp_path: Path) -> None:
    Run(organs(cache, tmp_path / "organs", steps=1)).fit()
    with pytest.raises(DataError, match="weights of another network"):
        Run(Plan("roi", cache, tmp_path / "roi", LIGHT, steps=1, init=tmp_path / "organs" / CHECKPOINT))
    with pytest.raises(DataError, match=r"nowhere\.pt: cannot be read \(No such file or directory\)"):
        Run(organs(cache, tmp_path / "new", steps=1, init=tmp_path / "nowhere.pt"))


@pytest.mark.skipif(not (RELEASED / "organs.safetensors").is_file(), reason="no released weights")
def test_a_new_run_starts_from_released_weights(tmp_path: Path, cache: Path) -> None:
    released = pytest.importorskip("safetensors.torch").load_file(RELEASED / "organs.safetensors")
    run = Run(organs(cache, tmp_path / "new", steps=1, init=RELEASED / "organs.safetensors"))
    state = run.network.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in released.items())
    with pytest.raises(DataError, match="another network"):
        Run(organs(cache, tmp_path / "other", steps=1, init=RELEASED / "roi.safetensors"))


# Presets and networks


@pytest.mark.parametrize(("recipe", "variant"), [(LIGHT, "guided"), (replace(PAPER, augment="torch"), "densevnet")])
def test_a_run_says_whether_the_image_guides_its_logits(
    cache: Path, tmp_path: Path, recipe: Recipe, variant: str
) -> None:
    run = Run(organs(cache, tmp_path, recipe, steps=1))
    assert isinstance(run.network, DenseVNet)
    assert run.network.guided == recipe.guided == (variant == "guided")
    run.fit()
    assert read_checkpoint(tmp_path / CHECKPOINT, CPU)["variant"] == variant


def test_a_gentle_end_goes_on_from_a_light_run(marked_cache: Path, tmp_path: Path) -> None:
    begun = Run(organs(marked_cache, tmp_path / "begun", steps=1))
    begun.fit()
    gentle = replace(PRESETS["gentle"], size=LIGHT.size)
    run = Run(organs(marked_cache, tmp_path / "ended", gentle, init=tmp_path / "begun" / CHECKPOINT))
    assert_same(dict(run.network.state_dict()), begun.average.state)
    assert (run.steps, run.minutes) == (400, None)
    assert begun.model is not begun.network
    assert run.model is run.network
    assert isinstance(run.sampler, OrganSampler)
    assert run.sampler.augmentation == GENTLE


def test_half_the_samples_of_a_mixed_end_are_gentle(marked_cache: Path, tmp_path: Path) -> None:
    mixed = replace(PRESETS["mixed"], size=LIGHT.size)
    run = Run(organs(marked_cache, tmp_path, mixed, steps=2))
    assert isinstance(run.sampler, MixedSampler)
    assert run.sampler.share == 0.5
    strong, gentle = run.sampler.first, run.sampler.second
    assert isinstance(strong, OrganSampler)
    assert isinstance(gentle, OrganSampler)
    assert (strong.augmentation, gentle.augmentation) == (LIGHT.augmentation, GENTLE)
    assert (strong.size, gentle.size) == (LIGHT.size, LIGHT.size)
    run.fit()
    assert all(bool(value.isfinite().all()) for value in read_checkpoint(tmp_path / CHECKPOINT, CPU)["export"].values())


def test_a_bordered_end_is_a_mixed_one_that_minds_borders(marked_cache: Path, tmp_path: Path) -> None:
    assert replace(PRESETS["bordered"], borders=0.0) == PRESETS["mixed"]
    losses = {}
    for name in ("mixed", "bordered"):
        run = Run(organs(marked_cache, tmp_path / name, replace(PRESETS[name], size=LIGHT.size), steps=1))
        run.fit()
        (row,) = read_log(tmp_path / name)
        losses[name] = {key: float(row[key]) for key in ("entropy", "dice_loss")}
    # Of the same sample and the same first weights.
    assert losses["bordered"]["dice_loss"] == losses["mixed"]["dice_loss"]
    assert losses["bordered"]["entropy"] > 1.5 * losses["mixed"]["entropy"]


def test_the_papers_preset_is_the_papers_table() -> None:
    paper = PRESETS["paper"]
    assert (paper.optimiser, paper.rate, paper.epochs, paper.loss) == ("sgd", 0.01, 600, "focal")
    assert (paper.size, paper.augment, paper.drop, paper.average) == ((96, 128, 192), "batchgenerators", 0.5, 0.0)


def test_the_papers_preset_runs(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("batchgenerators", reason="the paper's augmentation comes from batchgenerators")
    run = Run(organs(cache, tmp_path, PAPER, steps=3))
    assert isinstance(run.optimiser, torch.optim.SGD)
    run.fit()
    state = read_checkpoint(tmp_path / CHECKPOINT, CPU)
    assert_same(dict(state["export"]), dict(state["network"]))
    assert all(bool(value.isfinite().all()) for value in state["export"].values())
    (row,) = read_log(tmp_path)
    assert float(row["rate"]) == pytest.approx(np.mean([0.01 * (1 - k / 3) ** 0.9 for k in range(3)]), rel=1e-5)
    assert row["entropy"] == row["dice_loss"] == ""


def test_without_batchgenerators_the_papers_preset_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "batchgenerators"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "batchgenerators", None)
    with pytest.raises(PlanError, match="needs batchgenerators: pip install"):
        Run(organs(cache, tmp_path, PAPER, steps=1))


@pytest.mark.parametrize(("variant", "kind"), [("slim", SlimRoiUNet), ("paper", RoiUNet)])
def test_both_variants_of_the_roi_net_train(cache: Path, tmp_path: Path, variant: str, kind: type) -> None:
    run = Run(Plan("roi", cache, tmp_path, LIGHT, variant=variant, steps=2))
    assert isinstance(run.network, kind)
    assert run.size == (96, 96, 96)
    run.fit()
    state = read_checkpoint(tmp_path / CHECKPOINT, CPU)
    assert (state["kind"], state["variant"], state["step"]) == ("roi", variant, 2)
    assert parameter_count(run.network) == {"slim": 254_382, "paper": 1_326_113}[variant]


# On its own


BARE = """
import sys
for name in ("scipy", "nibabel", "tqdm", "openvino", "batchgenerators", "safetensors", "pynvml", "pandas"):
    sys.modules[name] = None
from training.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT / "app"), str(ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


@pytest.mark.slow
def test_fit_needs_torch_and_numpy_alone_and_warns_of_nothing(cache: Path, tmp_path: Path) -> None:
    shared = ["--data", str(cache), "--steps", "2", "--fold", "0", "3", "--threads", "1"]
    for network in (["organs", "--size", "24", "24", "32"], ["roi"]):
        out = tmp_path / network[0]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", BARE, "fit", *network, *shared, "--out", str(out)],
            env=environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert read_checkpoint(out / CHECKPOINT, CPU)["step"] == 2
        # Nothing but the lines of progress.
        assert all(line.startswith(f"{network[0]}: step ") for line in done.stderr.splitlines())
        assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_saves_and_goes_on(cache: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "training", "fit", "organs", "--data", str(cache), "--out", str(out)]
    command += ["--size", "24", "24", "32", "--threads", "1", "--minutes", "5"]
    with subprocess.Popen(command, env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("organs: step 1")
        process.send_signal(number)
        _, rest = ended(process)
    assert process.returncode == code
    (last,) = [line for line in rest.splitlines() if line.startswith("training:")]
    step = read_checkpoint(out / CHECKPOINT, CPU)["step"]
    assert step >= 1
    assert f"stopped by {signal.Signals(number).name}, saved at step {step}" in last
    again = subprocess.run(
        [*command, "--steps", str(step + 1)], env=environment(), cwd=tmp_path, capture_output=True, check=False
    )
    assert again.returncode == 0
    assert read_checkpoint(out / CHECKPOINT, CPU)["step"] == step + 1


# The line of progress


def test_progress_elsewhere_than_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("organs", 10, 3) as bar:
        bar.advance(0.4, 1.25)
        bar.advance(0.5, 1.0)
        bar.advance(1.0, 0.5)
    # The second comes too soon to be shown, the last is shown in any case.
    assert [line.split(" left")[0].rstrip() for line in capsys.readouterr().err.splitlines()] == [
        "organs: step 4/10, 40.0%, loss 1.2500",
        "organs: step 6/10, 100.0%, loss 0.5000 0 min",
    ]


def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 160.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("roi", None, 0) as bar:
        bar.advance(0.1, 2.0)
        bar.advance(0.3, 1.0)
    first, second = capsys.readouterr().err.split("\r")[1:]
    assert first.rstrip() == "roi: step 1, 10.0%, loss 2.0000"
    # A fifth in a minute: 3.5 more for the other seven tenths.
    assert second.rstrip() == "roi: step 2, 30.0%, loss 1.0000 4 min left"
    assert second.endswith("\n")


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_bf16_only_where_the_cpu_is_fast_at_it(
    capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert bf16_pays(torch.device("cpu")) is expected
    assert bf16_pays(torch.device("cuda"))
