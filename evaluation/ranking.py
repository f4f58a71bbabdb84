"""Ranking of programs case by case, as FLARE21 ranked its teams: rank, then average.

For every case each team gets one rank for its mean DSC over the organs, one for its mean NSD, one for its time and one
for its GPU memory; a team's score is the mean of all its ranks, divided by the number of teams
(https://flare.grand-challenge.org/Evaluation/).
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from fastorgan.errors import FastorganError

from .accuracy import case_of


class RankingError(FastorganError):
    """Score files cannot be read or do not fit together."""


class Criterion(NamedTuple):
    """What teams are ranked by.

    Attributes:
        name, unit: head its column.
        sign: 1 if less is better, -1 if more is.
        scale: from the files' unit to the table's.
    """

    name: str
    unit: str
    sign: int
    scale: float


DSC = Criterion("DSC", "%", -1, 100.0)
NSD = Criterion("NSD", "%", -1, 100.0)
TIME = Criterion("time", "s", 1, 1.0)
GPU_MEMORY = Criterion("GPU memory", "MB", 1, 1.0)

CRITERIA = (DSC, NSD, TIME, GPU_MEMORY)

EFFICIENCY = {"time": TIME, "gpu_memory": GPU_MEMORY, "gpu_mem": GPU_MEMORY, "maxgpu_mem": GPU_MEMORY}
"""Columns of the FLARE challenges' efficiency files, in lower case."""


@dataclass(frozen=True)
class Team:
    """What one program reached.

    Attributes:
        name: as in the table.
        scored: case and column of every accuracy figure.
        values: by criterion and case; empty for what is unknown.
    """

    name: str
    scored: frozenset[tuple[str, str]]
    values: Mapping[Criterion, Mapping[str, float]]

    @property
    def cases(self) -> frozenset[str]:
        """Names of the scored cases."""
        return frozenset(case for case, _ in self.scored)


@dataclass(frozen=True)
class Standing:
    """A team's place.

    Attributes:
        team: the team.
        place: from 1; teams of one score share the better place.
        score: mean rank divided by the number of teams: 1 / teams is the best, 1 the worst.
        ranks: mean rank by criterion.
    """

    team: Team
    place: int
    score: float
    ranks: Mapping[Criterion, float]


def read_team(name: str, accuracy: Path, efficiency: Path | None = None) -> Team:
    """Read a team's score file, and its efficiency file if there is one.

    Args:
        name: of the team.
        accuracy: a CSV file as `write_csv` writes it under either protocol: a column `Name`, and columns with DSC or
            NSD in their title. An empty cell is an organ left out. Efficiency columns may be in this file as well.
        efficiency: a CSV file as FLARE's harness writes it: a column `name`, then `time` and GPU memory in any of the
            years' spellings (`EFFICIENCY`); it overrules the score file. Cases match by file name without suffix and
            `_0000`; those that have no accuracy are passed over.

    Raises:
        RankingError: if a file cannot be read, names a case twice or holds words for numbers, or if no case has a DSC.
    """
    scored: set[tuple[str, str]] = set()
    figures: dict[Criterion, dict[str, list[float]]] = {criterion: {} for criterion in CRITERIA}
    for path, wanted in ((accuracy, CRITERIA), (efficiency, (TIME, GPU_MEMORY))):
        for case, cells in (_read_cells(path) if path is not None else {}).items():
            for column, cell in cells.items():
                criterion = _criterion(column)
                if criterion is None or criterion not in wanted or not cell:
                    continue
                value = _number(cell, f"{path}: {column} of {case}")
                if criterion in (DSC, NSD):
                    figures[criterion].setdefault(case, []).append(value)
                    scored.add((case, column))
                else:
                    figures[criterion][case] = [value]
    if not figures[DSC]:
        raise RankingError(f"{accuracy}: has no DSC of any case; give a file that `score --csv` wrote")
    cases = {case for case, _ in scored}
    means = {
        criterion: {case: float(np.mean(values)) for case, values in by_case.items() if case in cases}
        for criterion, by_case in figures.items()
    }
    return Team(name, frozenset(scored), means)


def rank(teams: Sequence[Team]) -> list[Standing]:
    """Rank teams by every criterion in every case, then average.

    Equal figures share the better rank, 1-1-3, as challengeR has it, which the organisers ranked FLARE22 with.

    Args:
        teams: two or more, scored alike: the same cases, organs and criteria.

    Returns:
        In the order of places, then as given.

    Raises:
        RankingError: if there are fewer than two teams, or they are not scored alike.
    """
    if len(teams) < 2:
        raise RankingError("a ranking needs the files of two teams or more")
    first = teams[0]
    for other in teams[1:]:
        _check_alike(first, other)
    ranks = {}
    for criterion in CRITERIA:
        if cases := sorted(first.values[criterion]):
            figures = np.array([[team.values[criterion][case] for case in cases] for team in teams])
            ranks[criterion] = rankdata(np.round(criterion.sign * figures, _TIE), method="min", axis=0)
    mean = np.concatenate(list(ranks.values()), axis=1).mean(axis=1)
    places = rankdata(np.round(mean, _TIE), method="min")
    standings = [
        Standing(
            team,
            int(places[row]),
            float(mean[row]) / len(teams),
            {criterion: float(of_all[row].mean()) for criterion, of_all in ranks.items()},
        )
        for row, team in enumerate(teams)
    ]
    return sorted(standings, key=lambda standing: standing.place)


def ranking_text(standings: Sequence[Standing]) -> str:
    """Lay a ranking out as text: a line a team, with mean figure and mean rank by criterion."""
    criteria = list(standings[0].ranks)
    lines = [["place", "team", "score"]]
    for criterion in criteria:
        lines[0] += [f"{criterion.name} {criterion.unit}", "rank"]
    for standing in standings:
        line = [str(standing.place), standing.team.name, f"{standing.score:.3f}"]
        for criterion in criteria:
            mean = float(np.mean(list(standing.team.values[criterion].values())))
            line += [f"{criterion.scale * mean:.1f}", f"{standing.ranks[criterion]:.2f}"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for place, team, *cells in lines:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True))
        text.append("  ".join((place.rjust(widths[0]), team.ljust(widths[1]), *right)))
    cases = len(standings[0].team.cases)
    text.append(
        f"score: mean rank over {cases} case{'' if cases == 1 else 's'} / {len(standings)} teams; less is better"
    )
    return "\n".join(text)


_TIE = 9
"""Decimals that figures tie to: means of the same numbers in another order differ in their last bits."""


def _criterion(column: str) -> Criterion | None:
    """What a CSV column is about; None for columns that do not matter here."""
    words = column.lower().replace("-", "_").split("_")
    return DSC if "dsc" in words else NSD if "nsd" in words else EFFICIENCY.get(column.lower())


def _read_cells(path: Path) -> dict[str, dict[str, str]]:
    """Read a CSV file's cells by case and column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            header, *rows = list(csv.reader(stream)) or [[]]
    except OSError as error:
        raise RankingError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RankingError(f"{path}: not a CSV file ({error})") from error
    columns = [title.strip() for title in header]
    if not columns or columns[0].lower() != "name":
        raise RankingError(f"{path}: its first column is not `Name`, so it is no score file")
    cases: dict[str, dict[str, str]] = {}
    for row in filter(None, rows):
        if len(row) != len(columns):
            raise RankingError(f"{path}: the line of {row[0]} has {len(row)} cells, the header {len(columns)}")
        case = case_of(row[0].strip()).removesuffix("_0000")
        if case in cases:
            raise RankingError(f"{path}: names the case {case} twice")
        cases[case] = {column: cell.strip() for column, cell in zip(columns[1:], row[1:], strict=True)}
    return cases


def _number(cell: str, what: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RankingError(f"{what} is {cell!r}, not a number")
    return value


def _check_alike(first: Team, other: Team) -> None:
    for case, column in sorted(first.scored ^ other.scored):
        having, lacking = (first, other) if (case, column) in first.scored else (other, first)
        raise RankingError(f"{lacking.name} has no {column} of {case}, {having.name} has; score both alike")
    for criterion in (TIME, GPU_MEMORY):
        if not any(team.values[criterion] for team in (first, other)):
            continue
        for team in (first, other):
            for case in sorted(team.cases - team.values[criterion].keys()):
                raise RankingError(
                    f"{team.name} has no {criterion.name} of {case}; give it for all cases and teams or none"
                )
