"""`python -m training`: prepare a cache, refine and warp it, fit a network, draw its curves, export the weights."""

import argparse
import dataclasses
import importlib.util
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fastorgan.errors import DeviceError, FastorganError

from .recipes import PRESETS

_HELP = argparse.RawDescriptionHelpFormatter

_STATISTICS = "measure batch norm's statistics anew on these scans, but for patients whom the run left out"

EXIT_CODES = """\
exit codes:
  0    done, or the slice is used up
  2    bad input or usage, one line on standard error
  130  interrupted (Ctrl-C); `fit` has saved its checkpoint
  143  terminated (SIGTERM); `fit` has saved its checkpoint"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        code: int = options.run(options)
    except (FastorganError, OSError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("training: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, epilog=EXIT_CODES, formatter_class=_HELP
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser(
        "prepare",
        help="make the compact training cache",
        epilog="example: python -m training prepare --data DATA --out runs/cache",
    )
    prepare.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with images/ and labels/, or FLARE21's own; structures/ may label further organs",
    )
    prepare.add_argument("--out", type=Path, required=True, help="cache folder to write")
    prepare.set_defaults(run=_prepare)

    warp = commands.add_parser(
        "warp",
        help="give the cache's scans the organ shapes of label maps",
        description="""\
Register the organs of every scan that shows all four, with liver, spleen and
pancreas whole, to those of label maps, and write the scans warped so. The maps
need no CT. They have the codes of labels/ (2 both kidneys) or of structures/ (2
right kidney, 13 left kidney); liver, spleen and pancreas must be there. Files
that are there already are kept.""",
        epilog="example: python -m training warp --data runs/cache --shapes label_maps --out runs/warped",
        formatter_class=_HELP,
    )
    warp.add_argument("--data", type=Path, required=True, help="cache folder")
    warp.add_argument("--shapes", type=Path, required=True, help="folder of label maps, *.nii.gz")
    warp.add_argument("--out", type=Path, required=True, help="folder for the warped scans")
    warp.add_argument("--each", type=_count, default=2, help="shapes that each scan is given (default: 2)")
    warp.add_argument("--seed", type=int, default=0, help="of which shapes (default: 0)")
    warp.add_argument("--threads", type=_count, help="CPU threads (default: torch's choice)")
    warp.set_defaults(run=_warp)

    refine = commands.add_parser(
        "refine",
        help="move the borders of liver and spleen to the image's edge beside fat",
        description="""\
Machine-made labels of livers end about a millimetre inside the edge that the
image has beside fat, of spleens a quarter. Write the organ net's volumes of a
cache, or of warped scans, with borders on the edge, and say how far the edge is
from the borders before and after.""",
        epilog="example: python -m training refine --data runs/cache --out runs/refined",
        formatter_class=_HELP,
    )
    refine.add_argument("--data", type=Path, required=True, help="folder of `prepare` or `warp`")
    refine.add_argument("--out", type=Path, required=True, help="folder for the refined volumes")
    refine.set_defaults(run=_refine)

    fit = commands.add_parser(
        "fit",
        help="train a network from the cache",
        epilog="example: python -m training fit organs --data runs/cache --out runs/organs --minutes 90\n\n"
        "The same command again resumes an unfinished run. The folder of the run holds checkpoint.pt and log.csv.\n"
        "Several GPUs, processes or machines: torchrun --nproc-per-node 4 -m training fit ... --device cuda",
        formatter_class=_HELP,
    )
    fit.add_argument("network", choices=("roi", "organs"))
    fit.add_argument("--data", type=Path, required=True, help="cache folder")
    fit.add_argument("--out", type=Path, required=True, help="folder of this run's checkpoint and log")
    fit.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="light",
        help="paper: as He and Luo did; light (default): what ships; gentle: an end of it, from --init, on scans "
        "that are disturbed less; mixed: one in which every second sample is; bordered: the same, with "
        "more weight on borders",
    )
    fit.add_argument("--variant", choices=("slim", "paper"), default="slim", help="of the ROI net (default: slim)")
    fit.add_argument(
        "--size", type=_count, nargs=3, metavar=("Z", "Y", "X"), help="samples of the organ net's crop, multiples of 8"
    )
    fit.add_argument("--rate", type=_amount, help="initial learning rate, instead of the preset's")
    fit.add_argument(
        "--structures",
        type=_weight,
        metavar="WEIGHT",
        help="of the loss of further organs, where the cache has them, instead of the preset's",
    )
    fit.add_argument("--steps", type=_count, help="length of the whole run, over all its slices")
    fit.add_argument("--minutes", type=_amount, help="length of the whole run; with --steps whichever ends first")
    fit.add_argument("--slice", type=_amount, metavar="MINUTES", help="stop after so long, to be resumed")
    fit.add_argument(
        "--fold", type=int, nargs=2, metavar=("K", "N"), help="leave out every N-th patient from the K-th, K from 0"
    )
    fit.add_argument(
        "--init",
        metavar="FILE",
        type=Path,
        help="a new run takes its weights from this checkpoint or .safetensors file",
    )
    fit.add_argument(
        "--warped",
        metavar="DIR",
        type=Path,
        help="train on these scans of `warp` as well, but for those of patients left out",
    )
    fit.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    fit.add_argument("--threads", type=_count, help="CPU threads (default: torch's choice)")
    fit.add_argument("--seed", type=int, default=0, help="of initialisation, order and augmentation (default: 0)")
    fit.set_defaults(run=_fit)

    export = commands.add_parser(
        "export",
        help="write released weights from a run's checkpoint",
        epilog="example: python -m training export organs --run runs/organs --version 0.1.0",
    )
    export.add_argument("network", choices=("roi", "organs"))
    export.add_argument("--run", type=Path, required=True, dest="folder", help="folder of the run")
    export.add_argument("--out", type=Path, default=Path("weights"), help="folder of released weights")
    export.add_argument(
        "--blend", metavar="FILE", type=Path, help="average the run's weights with these (.safetensors)"
    )
    export.add_argument("--share", type=_share, default=0.5, help="of the mean that --blend has (default: 0.5)")
    export.add_argument("--cache", type=Path, metavar="CACHE", help=_STATISTICS)
    export.add_argument("--version", required=True, help="of the weights, for the manifest")
    export.set_defaults(run=_export)

    quantise = commands.add_parser(
        "quantise",
        help="add to released weights their form in eight bits, which a CPU runs faster",
        description="Needs NNCF: pip install '.[quantise]'. To be run again after each export.",
        epilog="example: python -m training quantise --data DATA",
    )
    quantise.add_argument("--data", type=Path, required=True, help="the training data: images/ and labels/")
    quantise.add_argument("--weights", type=Path, default=Path("weights"), help="folder of released weights")
    quantise.add_argument("--every", type=_count, default=3, help="take every N-th scan (default: 3)")
    quantise.set_defaults(run=_quantise)

    left_out = commands.add_parser(
        "left-out",
        help="segment the patients that a run of `fit --fold` left out, to be scored",
        epilog="example: python -m training left-out --run runs/fold0 --data DATA --cache runs/cache --out runs/out\n"
        "then:    python -m evaluation score runs/out DATA/labels",
        formatter_class=_HELP,
    )
    left_out.add_argument("--run", type=Path, required=True, dest="folder", help="folder of the run")
    left_out.add_argument("--data", type=Path, required=True, help="folder that the cache was prepared from")
    left_out.add_argument("--out", type=Path, required=True, help="folder for the labels; all folds may share it")
    left_out.add_argument("--cache", type=Path, metavar="CACHE", help=_STATISTICS)
    left_out.set_defaults(run=_left_out)

    boxes = commands.add_parser(
        "boxes",
        help="say how well the ROI net's boxes hold the organs of scans left out, as they are and changed",
        description="""\
Frame every scan by what the ROI net finds in it: as it is, in parts, on turned
grids and with other grey values. Prints a table: how far organs stick out of what
is found, how far off its sides are in the mean, what is lost outside the box, and
the box's volume over that of the box framed by labels.""",
        epilog="example: python -m training boxes --data runs/cache --run runs/roi",
        formatter_class=_HELP,
    )
    boxes.add_argument("--data", type=Path, required=True, help="cache folder")
    judged = boxes.add_mutually_exclusive_group()
    judged.add_argument(
        "--run", type=Path, dest="folder", help="folder of a run of `fit roi --fold`, to judge by whom it left out"
    )
    judged.add_argument(
        "--fold", type=int, nargs=2, metavar=("K", "N"), help="judge the released net by these patients (default: all)"
    )
    boxes.set_defaults(run=_boxes)

    curves = commands.add_parser(
        "curves",
        help="draw loss and Dice of runs",
        epilog="example: python -m training curves runs/fold0 runs/fold1 --out curves.png",
    )
    curves.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run of `fit`")
    curves.add_argument("--out", type=Path, required=True, help="PNG to write")
    curves.set_defaults(run=_curves)
    return parser


def _prepare(options: argparse.Namespace) -> int:
    from .cache import prepare
    from .cases import find_cases

    cases = find_cases(options.data)
    for number, case in enumerate(prepare(cases, options.out), 1):
        print(f"[{number}/{len(cases)}] {case.name} (patient {case.patient})", flush=True)
    return 0


def _warp(options: argparse.Namespace) -> int:
    _need_torch()
    import torch

    from .warp import find_shapes, find_whole, warp_all

    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = find_shapes(options.shapes)
    for warped in warp_all(find_whole(options.data), shapes, options.out, options.each, options.seed):
        print(f"{warped.name}: {warped.text()}", flush=True)
    return 0


def _refine(options: argparse.Namespace) -> int:
    from .edges import refine

    for refinement in refine(options.data, options.out):
        print(refinement.text(), flush=True)
    return 0


def _fit(options: argparse.Namespace) -> int:
    _need_torch()
    import torch

    from .fit import Plan, PlanError, Run
    from .world import joined

    if options.size and options.network == "roi":
        raise PlanError("the ROI net's size is fixed; leave out --size")
    if options.threads:
        torch.set_num_threads(options.threads)
    changes = {
        "size": tuple(options.size) if options.size else None,
        "rate": options.rate,
        "structures": options.structures,
    }
    recipe = dataclasses.replace(PRESETS[options.preset], **{k: v for k, v in changes.items() if v is not None})
    plan = Plan(
        options.network,
        options.data,
        options.out,
        recipe,
        variant=options.variant,
        steps=options.steps,
        minutes=options.minutes,
        slice_minutes=options.slice,
        fold=tuple(options.fold) if options.fold else None,
        init=options.init,
        warped=options.warped,
        device=options.device,
        seed=options.seed,
    )
    with joined(plan.device) as world:
        run = Run(plan, world)
        stopped, step = run.fit(), run.step
        del run
    if stopped is None:
        return 0
    if world.first:
        print(
            f"training: stopped by {stopped.name}, saved at step {step}; the same command goes on from there",
            file=sys.stderr,
        )
    return 128 + stopped


def _export(options: argparse.Namespace) -> int:
    _need_torch()
    from .checkpoint import CHECKPOINT
    from .export import Blend, export

    blend = Blend(options.blend, options.share) if options.blend else None
    run = options.folder / CHECKPOINT
    difference = export(options.network, run, options.out, options.version, blend, options.cache)
    print(f"{options.out}: {options.network} exported; engines differ by at most {difference:.2e} of the logits' SD")
    return 0


def _left_out(options: argparse.Namespace) -> int:
    _need_torch()
    from .left_out import segment_left_out

    for case in segment_left_out(options.folder, options.data, options.out, cache=options.cache):
        print(options.out / f"{case.name}.nii.gz", flush=True)
    return 0


def _boxes(options: argparse.Namespace) -> int:
    _need_torch()
    from fastorgan.runtime import OpenVinoRuntime
    from fastorgan.weights import Weights

    from .boxes import judge_all, table
    from .cache import load_cache
    from .cases import split_fold
    from .left_out import patients_left_out, weights_with

    volumes = load_cache(options.data, "roi")
    patients = {volume.patient for volume in volumes}
    if options.folder:
        patients = patients_left_out(options.folder)
    elif options.fold:
        patients = split_fold(sorted(patients), *options.fold)
    with weights_with(options.folder) if options.folder else nullcontext(None) as folder:
        network = OpenVinoRuntime(precision="f32").load(Weights.find(folder), "roi")
    print(table(judge_all(network, [volume for volume in volumes if volume.patient in patients])))
    return 0


def _curves(options: argparse.Namespace) -> int:
    from .curves import draw_curves
    from .log import LOG

    draw_curves([folder / LOG for folder in options.runs], options.out)
    print(options.out)
    return 0


def _quantise(options: argparse.Namespace) -> int:
    _need_torch()
    from fastorgan.weights import Weights

    from .cases import find_cases
    from .quantise import quantise

    scans = [case.image for case in find_cases(options.data)][:: options.every]
    quantise(Weights.find(options.weights), scans)
    print(f"{options.weights}: both networks in eight bits, by {len(scans)} scans")
    return 0


def _need_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise DeviceError("training needs torch: pip install 'fastorgan[train]'")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not zero or a positive number")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
