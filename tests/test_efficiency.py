import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from evaluation.accuracy import FLARE21 as FLARE21_SCORES
from evaluation.accuracy import CaseScores, Score
from evaluation.accuracy import write_csv as write_scores
from evaluation.efficiency import (
    FLARE21,
    FLARE22,
    FLARE23,
    LAYOUTS,
    EfficiencyError,
    Layout,
    Measurement,
    Reading,
    Table,
    area,
    plot,
    stable_maximum,
    write_csv,
    write_json,
)
from evaluation.ranking import GPU_MEMORY, TIME, read_team
from fastorgan.labels import ORGANS

ROOT = Path(__file__).parents[1]

# 51 readings of the card: 1000.5 MiB, but 3 of 1800 and one spike to 4000.25, which is 1.96 % of them.
GPU = [1000.5] * 47 + [1800.0] * 3 + [4000.25]
# On four cores: half idle, then busy. 100 - 100 * 0.2 / (0.4 + 0.1) = 60, and 100.
CPU = [(0.1, 0.1, 0.2)] * 50 + [(0.3, 0.1, 0.0)]
# The last of them the highest.
RAM = [2048.0] * 50 + [3000.126]


def measurement(name: str = "case_001_0000", seconds: float = 12.345, exit_code: int | None = 0) -> Measurement:
    readings = tuple(
        Reading(0.1 * number, gpu, *cpu, ram)
        for number, (gpu, cpu, ram) in enumerate(zip(GPU, CPU, RAM, strict=True), 1)
    )
    return Measurement(name, "docker container run", seconds, readings, exit_code)


def without_gpu(run: Measurement) -> Measurement:
    readings = tuple(replace(reading, gpu_mib=None) for reading in run.readings)
    return replace(run, readings=readings, gpu_note="no NVIDIA driver answers here")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1000.0] * 98 + [5000.0] * 2, 1000.0),  # 2 % is not more than 2 %
        ([1000.0] * 97 + [5000.0] * 3, 5000.0),
        ([5000.0, 5000.0, 5000.0] + [1000.0] * 97, 5000.0),  # wherever it is
        ([1000.0] * 97 + [4999.0, 5000.0, 5001.0], 1000.0),  # the exact value counts, not its neighbours
        ([float(value) for value in range(49)], 48.0),  # one of 49 is more than 2 %
        ([float(value) for value in range(50)], 49.0),  # none is stable: the plain maximum
        ([0.0] * 60, 0.0),
        ([7.5], 7.5),
        ([], 0.0),
    ],
)
def test_stable_maximum(values: list[float], expected: float) -> None:
    assert stable_maximum(values) == expected


def test_area_is_the_sum_times_a_tenth_of_a_second() -> None:
    assert area([100.0, 200.5, 300.0]) == pytest.approx(60.05)
    assert area([]) == 0.0


@pytest.mark.parametrize(
    ("user", "system", "idle", "expected"),
    [
        (0.1, 0.1, 0.0, 100.0),
        (0.05, 0.05, 0.2, 50.0),  # 100 - 100 * 0.2 / (0.3 + 0.1)
        (0.0, 0.0, 0.2, 100.0 / 3.0),  # two idle cores: 100 - 100 * 0.2 / 0.3
        (0.0, 0.0, 0.0, 100.0),
    ],
)
def test_cpu_utilisation(user: float, system: float, idle: float, expected: float) -> None:
    assert Reading(0.1, None, user, system, idle, 0.0).cpu_percent == pytest.approx(expected)


def test_figures() -> None:
    run = measurement()
    assert run.gpu_stable_mib == 1800.0
    assert run.gpu_max_mib == 4000.25
    assert run.gpu_auc_mib_s == pytest.approx(5642.375)  # (47 * 1000.5 + 3 * 1800 + 4000.25) / 10
    assert run.cpu_max_percent == pytest.approx(100.0)
    assert run.cpu_auc_percent_s == pytest.approx(310.0)  # (50 * 60 + 100) / 10
    assert run.ram_max_mib == 3000.126
    assert run.ram_auc_mib_s == pytest.approx(10540.0126)


def test_figures_without_any_reading() -> None:
    run = Measurement("a", "", 1.0, (), 0)
    assert (run.gpu_stable_mib, run.gpu_max_mib, run.gpu_auc_mib_s) == (0, 0, 0)
    assert (run.cpu_max_percent, run.cpu_auc_percent_s, run.ram_max_mib, run.ram_auc_mib_s) == (0, 0, 0, 0)


def test_failed_readings_of_the_card_are_left_out() -> None:
    run = measurement()
    run = replace(run, readings=(replace(run.readings[0], gpu_mib=None), *run.readings[1:]))
    assert len(run.gpu_mib) == 50
    assert run.gpu_auc_mib_s == pytest.approx(5542.325)
    assert run.gpu_stable_mib == 1800.0


def rows(layout: Layout, folder: Path, *runs: Measurement) -> list[str]:
    path = folder / "x.csv"
    write_csv(runs, layout, path)
    return path.read_text().splitlines()


def test_flare21_file(tmp_path: Path) -> None:
    header, row = rows(FLARE21, tmp_path, measurement())
    assert header == "name,time,gpu_memory,time_multiply_memory"
    name, time, memory, product = row.split(",")
    assert (name, time, memory) == ("case_001_0000", "12.345", "1800.0")
    assert float(product) == pytest.approx(5642.375)


def test_flare22_file(tmp_path: Path) -> None:
    header, row = rows(FLARE22, tmp_path, measurement())
    assert header == "Name,Time,GPU_Mem,AUC_GPU_Time,CPU_Utilization,AUC_CPU_Time,RAM,AUC_RAM_Time"
    # np.round makes 12.34 of 12.345, whereas round makes 12.35.
    assert row == "case_001_0000.nii.gz,12.34,1800.0,5642.0,100.0,310.0,3000.13,10540.0"


def test_flare23_file(tmp_path: Path) -> None:
    header, row = rows(FLARE23, tmp_path, measurement(seconds=2.5))
    assert header == "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"
    assert row == "case_001_0000.nii.gz,2.5,4000.0,5642.0,100.0,310.0,3000.13,10540.0"


def test_a_stopped_container_has_the_penalties_of_flare22(tmp_path: Path) -> None:
    run = measurement(exit_code=None)
    assert rows(FLARE21, tmp_path, run)[1] == "case_001_0000,3600.0,1800.0,29491200.0"
    expected = "case_001_0000.nii.gz,3600.0,{},29491200.0,100.0,360000.0,3000.13,10540.0"
    assert rows(FLARE22, tmp_path, run)[1] == expected.format("1800.0")
    assert rows(FLARE23, tmp_path, run)[1] == expected.format("4000.0")


def test_without_a_gpu_its_columns_are_0(tmp_path: Path) -> None:
    run = without_gpu(measurement())
    assert rows(FLARE21, tmp_path, run)[1] == "case_001_0000,12.345,0.0,0.0"
    for layout in (FLARE22, FLARE23):
        assert rows(layout, tmp_path, run)[1] == "case_001_0000.nii.gz,12.34,0.0,0.0,100.0,310.0,3000.13,10540.0"


def test_files_without_a_case_have_the_header_alone(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        assert rows(layout, tmp_path) == [",".join(layout.header)]


@pytest.mark.parametrize(
    ("layout", "time", "memory"), [(FLARE21, 12.345, 1800), (FLARE22, 12.34, 1800), (FLARE23, 12.34, 4000)]
)
def test_the_ranking_reads_every_file(layout: Layout, time: float, memory: float, tmp_path: Path) -> None:
    scores = {organ.name: Score(0.9, 0.8) for organ in ORGANS}
    write_scores([CaseScores("case_001.nii.gz", scores)], FLARE21_SCORES, tmp_path / "scores.csv")
    write_csv([measurement()], layout, tmp_path / "efficiency.csv")
    team = read_team("ours", tmp_path / "scores.csv", tmp_path / "efficiency.csv")
    assert team.values[TIME] == {"case_001": time}
    assert team.values[GPU_MEMORY] == {"case_001": memory}


def test_json_has_every_reading_and_its_unit(tmp_path: Path) -> None:
    run = replace(measurement(exit_code=None), problems=("stopped after 12 s",))
    write_json(run, tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert (data["case"], data["exit_code"], data["hung"]) == ("case_001_0000", None, True)
    assert data["problems"] == ["stopped after 12 s"]
    assert data["wall_time_s"] == 12.345  # the true one
    assert data["gpu_memory_stable_max_mib"] == 1800.0
    assert data["cpu_utilisation_auc_percent_s"] == 360000
    readings = data["readings"]
    assert readings.pop("interval_s") == 0.1
    assert {key: len(values) for key, values in readings.items()} == dict.fromkeys(readings, 51)
    assert readings["gpu_memory_mib"] == GPU
    assert readings["ram_mib"] == RAM
    assert (readings["cpu_user_s"][0], readings["cpu_system_s"][0], readings["cpu_idle_s"][0]) == (0.1, 0.1, 0.2)
    assert readings["cpu_utilisation_percent"][0] == pytest.approx(60.0)
    assert readings["time_s"][:2] == [0.1, 0.2]


def test_json_of_a_gpu_that_was_not_read(tmp_path: Path) -> None:
    write_json(without_gpu(measurement()), tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["gpu_note"] == "no NVIDIA driver answers here"
    assert data["gpu_memory_max_mib"] == 0.0
    assert data["readings"]["gpu_memory_mib"] == [None] * 51


def test_plot_has_a_panel_for_the_gpu_only_if_it_was_read(tmp_path: Path) -> None:
    plot(measurement("a_$b_0000"), tmp_path / "with.png")  # no formula
    plot(without_gpu(measurement()), tmp_path / "without.png")
    with Image.open(tmp_path / "with.png") as high, Image.open(tmp_path / "without.png") as low:
        assert high.format == low.format == "PNG"
        assert high.width == low.width
        # Three panels of 220 pixels, or two, and the title.
        assert (high.height, low.height) == (720, 500)
        # The drawn line's blue.
        colours = high.convert("RGB").getcolors(1 << 16)
        assert colours is not None
        assert (31, 119, 180) in {colour for _, colour in colours}


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "a"
    writers: list[Callable[[], None]] = [
        lambda: write_csv([], FLARE21, gone),
        lambda: write_json(measurement(), gone),
        lambda: plot(measurement(), gone.with_suffix(".png")),
    ]
    for write in writers:
        with pytest.raises(EfficiencyError, match=r"gone/a.*: cannot be written \(No such file or directory\)"):
            write()


def test_table_names_the_units() -> None:
    table = Table(["case_001_0000", "b"])
    header = table.header()
    assert header.split("  ")[0] == "case"
    for title in ("time s", "GPU max MiB", "GPU MiB·s", "CPU max %", "CPU %·s", "RAM max MiB", "RAM MiB·s"):
        assert title in header
    row, mean = table.row(measurement()), table.mean([measurement(), measurement("b", seconds=7.655)])
    assert row.split() == ["case_001_0000", "12.35", "1800", "5642", "100.0", "310", "3000", "10540"]
    assert mean.split() == ["mean", "10.00", "1800", "5642", "100.0", "310", "3000", "10540"]
    assert len(header) == len(row) == len(mean)


def test_the_command_line_loads_neither_matplotlib_nor_psutil() -> None:
    code = "import sys, evaluation.__main__; print([m for m in ('matplotlib', 'psutil', 'pynvml') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'app'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_matplotlib_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EfficiencyError, match=r"matplotlib is not installed; pip install 'fastorgan\[evaluation\]'"):
        plot(measurement(), tmp_path / "a.png")


def test_csv_quotes_a_name_with_a_comma(tmp_path: Path) -> None:
    write_csv([measurement("a,b")], FLARE21, tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as stream:
        assert list(csv.reader(stream))[1][:2] == ["a,b", "12.345"]
