"""The command `fastorgan`, also `python -m fastorgan`."""

import argparse
import io
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .console import say, warn
from .errors import FastorganError, VolumeError
from .signals import Terminated, terminable

if TYPE_CHECKING:
    from .predict import Job

EXIT_CODES = """\
exit codes:
  0    all is done (predict: every case; doctor: nothing is wrong)
  2    bad input or usage: each failed case has one line on standard error, the others are done
  130  interrupted (Ctrl-C)
  143  terminated (SIGTERM)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # A file's name may hold bytes that are no text; it must not end a run when it is printed.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with terminable():
            code: int = options.run(options)
    except FastorganError as error:
        if options.debug:
            traceback.print_exc()
        warn(str(error))
        return 2
    except Exception as error:
        if options.debug:
            raise
        warn(f"failed unexpectedly ({type(error).__name__}: {' '.join(str(error).split())}); --debug shows where")
        return 2
    except KeyboardInterrupt:
        warn("interrupted")
        return 130
    except Terminated as error:
        warn("terminated")
        return error.code
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastorgan",
        description="Find liver, kidneys, spleen and pancreas in abdominal CT. Not a medical device.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastorgan {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_predict(commands)
    _add_doctor(commands)
    _add_phantom(commands)
    _add_completion(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    predict = commands.add_parser(
        "predict",
        help="segment CT volumes",
        description="Segment CT volumes in HU: NIfTI (.nii.gz, .nii, .hdr with .img), MetaImage (.mha), NRRD (.nrrd).\n"
        "X_0000.nii.gz, X.nii.gz, X.mha and so on become X.nii.gz with the labels 1 liver, 2 kidney, 3 spleen,\n"
        "4 pancreas on the input's own grid. A folder of DICOM slices becomes FOLDER.nii.gz.",
        epilog="examples:\n  fastorgan predict inputs/ outputs/ --report run.json\n"
        "  fastorgan predict inputs/ outputs/ --page outputs/report.html --statistics outputs/organs.csv\n"
        "  fastorgan predict ct.nii.gz labels.nii.gz --device cpu\n"
        f"  fastorgan predict study/ outputs/ --series 4 --dicom-seg\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument(
        "inputs", metavar="INPUT", nargs="+", type=Path, help="files, or folders of files or DICOM slices"
    )
    predict.add_argument("output", metavar="OUTPUT", type=Path, help="folder; for a single file also a label file")
    cases = predict.add_argument_group("which cases")
    written = predict.add_argument_group("what is written besides labels (docs/outputs.md)")
    work = predict.add_argument_group("how it runs")
    _add_device(work)
    work.add_argument(
        "--jobs",
        type=_positive,
        default=2,
        help="cases worked on at a time, so that one is read or written while another is segmented; each holds its "
        "scan in memory (default: 2)",
    )
    work.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="work on a Ray cluster: local, auto or ray://HOST:PORT; a worker for each GPU or every --threads cores",
    )
    written.add_argument("--report", metavar="FILE", type=Path, help="write a run report (JSON)")
    written.add_argument(
        "--page", metavar="FILE", type=Path, help="write the report as a web page (HTML) with pictures"
    )
    written.add_argument("--preview", action="store_true", help="write a picture (PNG) beside each label file")
    written.add_argument("--split", action="store_true", help="write one mask per organ as well, in a folder per case")
    written.add_argument(
        "--statistics", metavar="FILE", type=Path, help="write volume, HU and box of each organ (.csv or .json)"
    )
    written.add_argument(
        "--label-tables", action="store_true", help="write the labels' colours for 3D Slicer and ITK-SNAP"
    )
    cases.add_argument(
        "--series", metavar="S", help="which DICOM series of a folder: its number, the ending of its UID, or all"
    )
    written.add_argument(
        "--dicom-seg", action="store_true", help="write a DICOM SEG beside the label file of a DICOM series"
    )
    cases.add_argument(
        "--grand-challenge",
        metavar="SOCKET",
        help="read INPUT/images/ct/*.mha and write OUTPUT/images/SOCKET/*.mha, as grand-challenge.org does",
    )
    cases.add_argument(
        "--shard",
        metavar="I/N",
        type=_shard,
        help="take every N-th case from the I-th, I from 0, as one of N processes",
    )
    cases.add_argument("--resume", action="store_true", help="leave out the cases whose labels are there already")
    work.add_argument("--max-voxels", metavar="N", type=_positive, help="refuse larger volumes (default: 2147483648)")
    predict.set_defaults(run=_predict)


def _add_device(command: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """The options that say what runs the networks."""
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    command.add_argument("--engine", default="auto", help="auto, openvino or torch (default: auto)")
    command.add_argument("--threads", type=_positive, help="CPU threads (default: all cores, in a long batch fewer)")
    command.add_argument("--weights", metavar="DIR", type=Path, help="other weights than the released ones")


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="tell what predict would run on, and what is wrong",
        description="Tell on one screen which device, driver, versions, weights, memory and disk `fastorgan predict`\n"
        "would use here, run the networks once, and say what is wrong.",
        epilog=f"examples:\n  fastorgan doctor\n  fastorgan doctor outputs/ --device cuda --json\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "output", metavar="OUTPUT", nargs="?", type=Path, default=Path(), help="folder for labels (default: this one)"
    )
    _add_device(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON, for programs and bug reports")
    doctor.set_defaults(run=_doctor)


def _add_completion(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script that completes fastorgan's options in a shell",
        description="Print a script that completes fastorgan's options in a shell (needs: pip install shtab).",
        epilog="example: fastorgan completion bash > ~/.local/share/bash-completion/completions/fastorgan",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run=_completion)


def _add_phantom(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    phantom = commands.add_parser(
        "phantom",
        help="make a synthetic CT of the abdomen, to try things with",
        epilog="example: fastorgan phantom inputs/phantom_0000.nii.gz --labels truth/phantom.nii.gz",
    )
    phantom.add_argument("output", metavar="OUTPUT", type=Path, help="CT file to write (.nii.gz or .nii)")
    phantom.add_argument("--labels", metavar="FILE", type=Path, help="write the true labels as well")
    phantom.add_argument("--seed", type=int, default=0, help="another seed, another patient (default: 0)")
    phantom.set_defaults(run=_phantom)


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let imports in the block do without a module that they would load where it is installed, and can do without."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _predict(options: argparse.Namespace) -> int:
    # Half of what is imported before the first case: for DICOM within NIfTI headers, which nothing here looks at.
    with _hidden("pydicom"):
        import nibabel  # noqa: F401

    from .nifti import MAX_VOXELS
    from .outputs import Outputs
    from .predict import Settings, run_batch
    from .report import Status

    # OpenVINO imports its model converter where it finds it, which takes longer than all the rest of it. Nothing in
    # this process wants the converter.
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]
    shown = {key: value for key, value in vars(options).items() if key != "run"}
    settings = Settings(
        options.device,
        options.engine,
        options.threads,
        options.weights,
        options.jobs,
        options.report,
        Outputs(options.preview, options.split, options.statistics, options.label_tables, options.page, options.resume),
        options.debug,
        shown,
        options.resume,
        options.max_voxels or MAX_VOXELS,
        options.dicom_seg,
    )
    jobs = _jobs(options)
    if options.dicom_seg and jobs and not any(job.series for job in jobs):
        raise VolumeError("--dicom-seg needs a folder of DICOM slices as input")
    if options.cluster is None:
        report = run_batch(jobs, settings)
    else:
        from .cluster import run_on_cluster

        report = run_on_cluster(jobs, settings, options.cluster)
    return 2 if any(case.status is Status.FAILED for case in report.cases) else 0


def _jobs(options: argparse.Namespace) -> "list[Job]":
    jobs = _all_jobs(options)
    if options.shard is None:
        return jobs
    first, of = options.shard
    return jobs[first::of]


def _all_jobs(options: argparse.Namespace) -> "list[Job]":
    from .predict import plan_jobs

    if options.grand_challenge is None:
        return plan_jobs(options.inputs, options.output, series=options.series)
    from .grand_challenge import SUFFIX, image_folders

    if len(options.inputs) > 1:
        raise VolumeError("--grand-challenge takes one input folder, usually /input")
    inputs, output = image_folders(options.inputs[0], options.output, options.grand_challenge)
    return plan_jobs([inputs], output, suffix=SUFFIX)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import Verdict, Wish, examine, screen, to_dict

    wish = Wish(options.device, options.engine, options.threads, options.weights, options.output)
    findings = examine(wish)
    if options.json:
        print(json.dumps(to_dict(findings), indent=2))
    else:
        for line in screen(findings).splitlines():
            say(line)
    return 2 if any(finding.verdict is Verdict.WRONG for finding in findings) else 0


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise FastorganError("completion needs shtab, which is not installed; try: pip install shtab") from error
    print(shtab.complete(_parser(), options.shell))
    return 0


def _phantom(options: argparse.Namespace) -> int:
    from .phantom import make_phantom
    from .volume import make_folder, save_image

    image, labels = make_phantom(seed=options.seed)
    for volume, path in ((image, options.output), (labels, options.labels)):
        if path is not None:
            make_folder(path.parent)
            save_image(volume, path)
            say(str(path))
    return 0


def _shard(text: str) -> tuple[int, int]:
    first, slash, of = text.partition("/")
    if not (slash and first.isdecimal() and of.isdecimal() and int(first) < int(of)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N - 1")
    return int(first), int(of)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
