"""The commands that measure speed and memory: `benchmark`, `throughput`, `scaling`, `floors` and `stretch`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

BENCHMARK = "benchmark"


def add_commands(commands: "Commands") -> None:
    """Add the parsers."""
    _add_benchmark(commands)
    _add_throughput(commands)
    _add_scaling(commands)
    _add_floors(commands)
    _add_stretch(commands)
    _add_engines(commands)


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the command itself is to read, and the options behind `--` that `benchmark` hands on.

    argparse loses them where an option of the command stands between them and the CT.
    """
    if argv[:1] != [BENCHMARK] or "--" not in argv:
        return list(argv), []
    place = argv.index("--")
    return list(argv[:place]), list(argv[place + 1 :])


def _add_benchmark(commands: "Commands") -> None:
    parser = commands.add_parser(
        BENCHMARK,
        usage="%(prog)s [-h] [--runs RUNS] [--no-reference] [--json FILE] CT [-- OPTION ...]",
        help="time and memory on one CT, beside the straightforward way",
        description="""\
Run `fastorgan predict` on a CT again and again, each time in a process of its
own, in turns with the straightforward way to do the same (nibabel's get_fdata,
SciPy's zoom, torch in float32, logits at full size), and once more on copies of
the CT for warm cases. Prints medians, the lowest and the highest, and how many
times as much the straightforward way takes.""",
        epilog="""\
Options behind -- go to `fastorgan predict`.

examples:
  python -m evaluation stretch sample/images/lidc0001_0000.nii.gz z300.nii.gz --slices 300
  python -m evaluation benchmark z300.nii.gz --json benchmark.json
  python -m evaluation benchmark z300.nii.gz --no-reference -- --device cuda""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ct", type=Path, metavar="CT", help="a .nii.gz or .nii file")
    parser.add_argument("--runs", type=_count, default=5, help="of each program (default: %(default)s)")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="fastorgan alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all readings")
    parser.set_defaults(run=_benchmark, options=[])


def _benchmark(args: argparse.Namespace) -> int:
    from .benchmark import benchmark

    result = benchmark(args.ct, args.runs, args.options, reference=args.reference)
    print(result.text())
    if args.json is not None:
        result.write(args.json)
    return 0


def _add_throughput(commands: "Commands") -> None:
    parser = commands.add_parser(
        "throughput",
        help="cases a minute by the number of jobs",
        description="Run `fastorgan predict` on a folder of copies of some CTs, once for each number of jobs in turns.",
        epilog="example: python -m evaluation throughput z300.nii.gz --cases 6 --jobs 2 3",
    )
    parser.add_argument("cts", type=Path, nargs="+", metavar="CT", help="taken round and round")
    parser.add_argument("--cases", type=_count, default=6, help="in the folder (default: %(default)s)")
    parser.add_argument("--jobs", type=_count, nargs="+", default=[2], help="beside 1 (default: 2)")
    parser.add_argument("--runs", type=_count, default=3, help="for each number of jobs (default: %(default)s)")
    parser.set_defaults(run=_throughput)


def _throughput(args: argparse.Namespace) -> int:
    from .benchmark import throughput

    print(throughput(args.cts, args.cases, args.runs, args.jobs).text())
    return 0


def _add_scaling(commands: "Commands") -> None:
    parser = commands.add_parser(
        "scaling",
        help="cost against slices and threads, with a plot",
        description="Stretch a CT to several numbers of slices and measure `fastorgan predict` on each.",
        epilog="example: python -m evaluation scaling sample/images/lidc0001_0000.nii.gz out",
    )
    parser.add_argument("ct", type=Path, metavar="CT")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="gets scaling.csv and scaling.png")
    parser.add_argument("--slices", type=_count, nargs="+", default=[50, 100, 200, 300, 500, 1000, 1500, 2000])
    parser.add_argument("--threads", type=_count, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=_count, default=2, help="the fastest counts (default: %(default)s)")
    parser.set_defaults(run=_scaling)


def _scaling(args: argparse.Namespace) -> int:
    from fastorgan.volume import make_folder

    from .scaling import measure_scaling, plot_points, write_points

    make_folder(args.out)
    points = []
    print(f"{'slices':>6}{'threads':>8}{'process, s':>11}{'CPU, s':>8}{'RSS, MB':>9}{'warm, s':>9}")
    for point in measure_scaling(args.ct, args.slices, args.threads, args.runs):
        points.append(point)
        print(
            f"{point.slices:6}{point.threads:8}{point.seconds:11.2f}{point.cpu_seconds:8.2f}{point.rss_mb:9.0f}"
            f"{point.case_seconds:9.2f}",
            flush=True,
        )
        # Anew after each, since the whole may take an hour.
        write_points(points, args.out / "scaling.csv")
        plot_points(points, args.out / "scaling.png")
    return 0


def _add_floors(commands: "Commands") -> None:
    parser = commands.add_parser(
        "floors",
        help="what no program could do without, in seconds",
        description="Measure the parts that cannot be left out: unpacking, multiplying, writing, starting.",
        epilog="example: python -m evaluation floors z300.nii.gz",
    )
    parser.add_argument("ct", type=Path, metavar="CT", help="a .nii.gz file")
    parser.add_argument("--runs", type=_count, default=5, help="the fastest counts (default: %(default)s)")
    parser.set_defaults(run=_floors)


def _floors(args: argparse.Namespace) -> int:
    from .floors import floors

    for name, seconds in floors(args.ct, args.runs).items():
        print(f"{seconds:8.3f} s  {name}")
    return 0


def _add_stretch(commands: "Commands") -> None:
    parser = commands.add_parser(
        "stretch",
        help="make a CT of any number of slices from a real one",
        description="Repeat a CT's slices along z, with noise, over the same body.",
        epilog="example: python -m evaluation stretch sample/images/lidc0001_0000.nii.gz z300.nii.gz --slices 300",
    )
    parser.add_argument("ct", type=Path, metavar="CT")
    parser.add_argument("out", type=Path, metavar="OUT", help=".nii.gz or .nii")
    parser.add_argument("--slices", type=_count, default=300, help="(default: %(default)s)")
    parser.set_defaults(run=_stretch)


def _stretch(args: argparse.Namespace) -> int:
    from .stretched import stretch

    stretch(args.ct, args.out, args.slices)
    print(args.out)
    return 0


def _add_engines(commands: "Commands") -> None:
    parser = commands.add_parser(
        "engines",
        help="time, memory, size and DSC of several engines and precisions",
        description="""\
Run the cascade end to end on labelled CTs with the same weights in several
engines and precisions, each in a process of its own: medians of the networks'
seconds, and mean DSC with its change against the first engine.""",
        epilog="""\
openvino int8 needs weights that `python -m training quantise` was run on, and
onnxruntime needs the packages onnxruntime, onnx and onnxscript. --gpu compares
torch in half precision on the first NVIDIA card with OpenVINO on the CPU:
eager, channels-last (which is what runs) and CUDA graphs. Seconds include the
way to the card and back; GPU MiB are the whole card's, less those in use before.

examples:
  python -m evaluation engines data sample --cases hcc002pv lidc0001
  python -m evaluation engines sample --gpu""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data",
        type=Path,
        nargs="+",
        metavar="DATA",
        help="a folder with images/NAME_0000.nii.gz and labels/NAME.nii.gz",
    )
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="these alone (default: all)")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="these alone (default: all of the CPU)")
    parser.add_argument("--gpu", action="store_true", help="those of the first NVIDIA card")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="others than the released ones")
    parser.set_defaults(run=_engines)


def _engines(args: argparse.Namespace) -> int:
    from fastorgan.weights import Weights

    from .engines import ON_CARD, ON_CPU, compare, describe_card, find_cases, header

    cases = [case for folder in args.data for case in find_cases(folder, args.cases)]
    names = args.engines or (ON_CARD if args.gpu else ON_CPU)
    if args.gpu:
        print(describe_card(), flush=True)
    print(f"{len(cases)} CTs; DSC in %, and its change against {names[0]}")
    print(header(), flush=True)
    compare(names, cases, Weights.find(args.weights).folder)
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)
