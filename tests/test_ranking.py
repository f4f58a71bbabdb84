from pathlib import Path

import pytest

from evaluation.ranking import DSC, GPU_MEMORY, NSD, TIME, RankingError, Standing, rank, ranking_text, read_team

HEADER = "Name,DSC_1,NSD-1mm_1,DSC_2,NSD-1mm_2"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three teams, two cases; mean DSC a: .9 .9 .8, b: .5 .6 .6; mean NSD a: .8 .7 .6, b: .4 .4 .4."""
    return [
        write(tmp_path / "one.csv", HEADER, "a.nii.gz,1.0,0.9,0.8,0.7", "b.nii.gz,0.5,0.4,0.5,0.4"),
        write(tmp_path / "two.csv", HEADER, "a.nii.gz,0.9,0.7,0.9,0.7", "b.nii.gz,0.75,0.4,0.45,0.4"),
        write(tmp_path / "three.csv", HEADER, "a.nii.gz,0.7,0.6,0.9,0.6", "b.nii.gz,0.625,0.5,0.575,0.3"),
    ]


def ranked(files: list[Path], efficiency: list[Path] | None = None) -> dict[str, Standing]:
    others: list[Path] | list[None] = efficiency or [None] * len(files)
    teams = [read_team(file.stem, file, other) for file, other in zip(files, others, strict=True)]
    return {standing.team.name: standing for standing in rank(teams)}


def test_accuracy_alone(files: list[Path]) -> None:
    # DSC ranks, a: 1 1 3, b: 3 1 1; NSD ranks, a: 1 2 3, b: 1 1 1.
    standings = ranked(files)
    assert list(standings) == ["two", "one", "three"]
    assert [standing.place for standing in standings.values()] == [1, 2, 3]
    assert standings["one"].ranks == {DSC: 2.0, NSD: 1.0}
    assert standings["two"].ranks == {DSC: 1.0, NSD: 1.5}
    assert standings["three"].ranks == {DSC: 2.0, NSD: 2.0}
    assert standings["one"].score == pytest.approx((1 + 3 + 1 + 1) / 4 / 3)
    assert standings["two"].score == pytest.approx((1 + 1 + 2 + 1) / 4 / 3)
    assert standings["three"].score == pytest.approx((3 + 1 + 3 + 1) / 4 / 3)


def test_efficiency_from_files_of_any_year(files: list[Path], tmp_path: Path) -> None:
    # Time ranks, a: 1 2 3, b: 3 1 2; memory ranks, a: 1 1 3, b: 2 1 3.
    efficiency = [
        write(
            tmp_path / "1", "name,time,gpu_memory,time_multiply_memory", "a_0000,1,0,0", "b_0000,9,5,45", "warm_up,,,"
        ),
        write(tmp_path / "2", "Name,Time,GPU_Mem,AUC_GPU_Time", "b.nii.gz,2.5,0,0", "a.nii.gz,2.0,0,0"),
        write(tmp_path / "3", "Name,Time,MaxGPU_Mem,Card", "a.nii.gz,3,2000,TITAN X", "b.nii.gz,3,2000,TITAN X"),
    ]
    standings = ranked(files, efficiency)
    assert standings["one"].ranks == {DSC: 2.0, NSD: 1.0, TIME: 2.0, GPU_MEMORY: 1.5}
    assert standings["two"].ranks == {DSC: 1.0, NSD: 1.5, TIME: 1.5, GPU_MEMORY: 1.0}
    assert standings["three"].ranks == {DSC: 2.0, NSD: 2.0, TIME: 2.5, GPU_MEMORY: 3.0}
    assert standings["two"].score == pytest.approx((1.0 + 1.5 + 1.5 + 1.0) / 4 / 3)
    assert [standing.place for standing in standings.values()] == [1, 2, 3]


def test_efficiency_within_the_score_file(tmp_path: Path) -> None:
    header = "Name,Liver_DSC,Liver_NSD,time"
    files = [
        write(tmp_path / "slow.csv", header, "a.nii.gz,0.9,0.9,20"),
        write(tmp_path / "fast.csv", header, "a.nii.gz,0.9,0.9,10"),
    ]
    standings = ranked(files)
    assert standings["fast"].score == pytest.approx(0.5)
    assert standings["slow"].score == pytest.approx((1 + 1 + 2) / 3 / 2)
    overruled = write(tmp_path / "other.csv", "name,time", "a,5")
    assert read_team("slow", files[0], overruled).values[TIME] == {"a": 5.0}


def test_equal_teams_share_a_place(tmp_path: Path) -> None:
    lines = {"x": "0.9,0.1", "y": "0.8,0.2", "z": "0.1,0.0"}
    files = [
        write(tmp_path / f"{name}.csv", "Name,DSC_1,NSD-1mm_1", f"a.nii.gz,{line}") for name, line in lines.items()
    ]
    standings = ranked(files)
    assert {name: standing.place for name, standing in standings.items()} == {"x": 1, "y": 1, "z": 3}
    assert standings["z"].score == 1.0


def test_organs_in_another_order_tie(tmp_path: Path) -> None:
    header = "Name,DSC_1,DSC_2,DSC_3,DSC_4"
    assert (0.1 + 0.2) + 0.3 != (0.3 + 0.2) + 0.1
    files = [
        write(tmp_path / "one.csv", header, "a.nii.gz,0.1,0.2,0.3,0.0"),
        write(tmp_path / "two.csv", header, "a.nii.gz,0.3,0.2,0.1,0.0"),
    ]
    assert [standing.place for standing in ranked(files).values()] == [1, 1]


def test_organs_left_out_do_not_count(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "one.csv", HEADER, "a.nii.gz,0.8,0.8,,"),
        write(tmp_path / "two.csv", HEADER, "a.nii.gz,0.9,0.7,,"),
    ]
    standings = ranked(files)
    assert standings["one"].team.values[DSC] == {"a": 0.8}
    assert standings["one"].ranks == {DSC: 2.0, NSD: 1.0}


def test_without_nsd(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.csv", HEADER, f"a.nii.gz,0.{n},,0.5,") for n in (8, 9)]
    assert {name: list(standing.ranks) for name, standing in ranked(files).items()} == {"9": [DSC], "8": [DSC]}


def test_text(files: list[Path]) -> None:
    lines = ranking_text(list(ranked(files).values())).splitlines()
    assert lines[0].split() == ["place", "team", "score", "DSC", "%", "rank", "NSD", "%", "rank"]
    assert lines[1].split() == ["1", "two", "0.417", "75.0", "1.00", "55.0", "1.50"]
    assert lines[2].split() == ["2", "one", "0.500", "70.0", "2.00", "60.0", "1.00"]
    assert lines[4] == "score: mean rank over 2 cases / 3 teams; less is better"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([HEADER, "a.nii.gz,1,1,1,1"], r"other has no DSC_1 of b, one has; score both alike"),
        ([HEADER, "a.nii.gz,1,1,1,1", "b.nii.gz,1,1,1,"], r"other has no NSD-1mm_2 of b"),
        ([HEADER, "a.nii.gz,1,1,1,1", "b.nii.gz,1,1,1,1", "c.nii.gz,1,1,1,1"], r"one has no DSC_1 of c, other has"),
        ([HEADER + ",time", "a.nii.gz,1,1,1,1,3", "b.nii.gz,1,1,1,1,3"], r"one has no time of a; give it for all"),
        ([HEADER, "a.nii.gz,1,1,1,1", "a,1,1,1,1"], r"other\.csv: names the case a twice"),
        ([HEADER, "a.nii.gz,1,1,1,one"], r"other\.csv: NSD-1mm_2 of a is 'one', not a number"),
        ([HEADER, "a.nii.gz,1,1,1,nan"], r"other\.csv: NSD-1mm_2 of a is 'nan', not a number"),
        ([HEADER, "a.nii.gz,1,1"], r"other\.csv: the line of a\.nii\.gz has 3 cells, the header 5"),
        (["name,time", "a,3"], r"other\.csv: has no DSC"),
        (["case,DSC_1", "a,3"], r"other\.csv: its first column is not `Name`"),
        ([], r"other\.csv: its first column is not `Name`"),
    ],
)
def test_files_that_do_not_fit(lines: list[str], reason: str, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RankingError, match=reason) as caught:
        ranked([files[0], write(tmp_path / "other.csv", *lines)])
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(RankingError, match=r"gone\.csv: cannot be read"):
        read_team("gone", tmp_path / "gone.csv")
    (tmp_path / "image.csv").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(RankingError, match=r"image\.csv: not a CSV file"):
        read_team("image", tmp_path / "image.csv")


def test_one_team_is_no_ranking(files: list[Path]) -> None:
    with pytest.raises(RankingError, match="two teams or more"):
        ranked(files[:1])
