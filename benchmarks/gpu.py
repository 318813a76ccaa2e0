"""Prove and measure everything that a CUDA machine can: `python benchmarks/gpu.py` from a source checkout.

Runs the GPU tests, measures the device's two ceilings, then every benchmark against them and against its baseline, and
writes one file of rows a benchmark and a page, summary.md, under benchmarks/results. Nothing needs to be installed, and
nothing is fetched. `--device cpu --tiny --out DIR` tries the command out on any machine; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# In the order they run: what proves comes before what measures, and the ceilings before what is held against them.
STAGES = ("tests", "ceilings", "sketch", "outer", "score", "overhead", "less", "memory")
_TESTS_FAIL = ("tests", False)
_WHOLE = ("ceilings", "less")  # the others skip what does not fit piece by piece
RESULTS = Path(__file__).resolve().parent / "results"


def arguments() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.5, help="what would take longer is skipped (default: 9.5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each time, at least 5")
    parser.add_argument("--sanitize", nargs="?", const="kernels or triton or outer or fused", metavar="EXPRESSION")
    parser.add_argument("--commit", help="written into the rows where the checkout has no .git")
    parser.add_argument("--one-file", action="store_true", help="all rows in results.json, beside summary.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, whose figures mean nothing")
    parser.add_argument("--resume", default="", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the stages; 0 where all of them ran and no test failed."""
    parser = arguments()
    options = parser.parse_args(argv)
    stages = [stage for stage in STAGES if stage in options.stages.split(",")]
    if unknown := set(options.stages.split(",")) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if (options.tiny and options.out is None) or (options.device == "cpu" and not options.tiny):
        parser.error("--device cpu needs --tiny, and --tiny needs --out: such figures are never results")
    from gpu_bootstrap import ensure_importable

    print(ensure_importable(), flush=True)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; to try the command out: --device cpu --tiny --out DIR")
    from gpu_session import DeviceLostError, Session

    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    session = Session(
        device,
        options.out or RESULTS / slug(torch.cuda.get_device_name(device)),
        tiny=options.tiny,
        repeats=options.repeats,
        seconds=60 * options.minutes - (time.monotonic() - STARTED),
        commit=options.commit,
        one_file=options.one_file,
    )
    session.resume(options.resume.split(",") if options.resume else [])
    for number, stage in enumerate(stages):
        lost = False
        try:
            run_stage(session, stage, options, alone=len(stages) == 1)
        except DeviceLostError:
            lost = True
        write_summary(session, options)
        if not lost:
            session.release()
        elif stages[number + 1 :]:
            restart(session, options, stages[number + 1 :])
    print((session.folder / "summary.md").read_text(encoding="utf-8"))
    failed = (row.get("status") == "failed" or (row["op"], row.get("met")) == _TESTS_FAIL for row in session.rows)
    return int(any(failed))


def run_stage(session: Any, stage: str, options: argparse.Namespace, alone: bool) -> None:
    """One stage; what it raises is recorded and ends nothing else."""
    started = time.monotonic()
    with session.attempt(stage):
        module = importlib.import_module(f"gpu_{stage}")
        expected = module.estimate(session)
        print(f"{stage}: about {expected:.0f} s, {session.seconds_left():.0f} s left", flush=True)
        if stage in _WHOLE and not session.fits(stage, expected):
            return
        if stage == "tests":
            module.run(session, share=1.0 if alone else 0.45, sanitize=options.sanitize)
        else:
            module.run(session)
        session.note("done", stage, took=f"{time.monotonic() - started:.0f} s", estimate_s=expected)


def write_summary(session: Any, options: argparse.Namespace) -> None:
    """Written anew after every stage, so that a run cut short has one."""
    from gpu_summary import summary

    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    (session.folder / "summary.md").write_text(summary(session.rows, command), encoding="utf-8")


def restart(session: Any, options: argparse.Namespace, stages: list[str]) -> None:
    """Go on with the other stages in a fresh process: after an illegal access this one's device answers no more."""
    print(f"the device is lost to this process; going on with {', '.join(stages)} in another", flush=True)
    given = ["--stages", ",".join(stages), "--minutes", f"{session.seconds_left() / 60:.3f}"]
    given += [
        "--resume",
        ",".join(session.begun()),
        "--out",
        str(session.folder),
        "--repeats",
        str(options.repeats),
        "--device",
        options.device,
    ]
    given += ["--commit", options.commit] if options.commit else []
    given += [flag for flag, on in (("--tiny", options.tiny), ("--one-file", options.one_file)) if on]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, __file__, *given])


def slug(name: str) -> str:
    """A device's name as a folder's: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
