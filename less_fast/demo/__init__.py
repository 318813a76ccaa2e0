"""The demo: LESS from nothing, on an invented corpus with a small model trained on the spot, in about two minutes."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from less_fast.config import RunConfig
from less_fast.demo.corpus import POOL_SIZES, TARGET_SKILLS, make_corpus
from less_fast.demo.model import plain_text, train_model, train_tokenizer
from less_fast.errors import LessFastError
from less_fast.pipeline import run, say_to_stderr
from less_fast.report import table
from less_fast.store import atomic_file
from less_fast.store.manifest import differences


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; the defaults take about two minutes on two CPU cores.

    ``pool_sizes``: skill -> examples in the pool. ``target_skills``, ``n_target``: what is selected for, and how many
    held-out examples say so. ``n_pretraining``, ``vocab_size``, ``steps``, ``hidden_size``, ``layers``: the small
    model and what it reads. ``run``: settings of the :class:`~less_fast.config.RunConfig` besides the files.
    """

    seed: int = 0
    pool_sizes: Mapping[str, int] = field(default_factory=lambda: dict(POOL_SIZES))
    target_skills: Sequence[str] = TARGET_SKILLS
    n_target: int = 16
    n_pretraining: int = 600
    vocab_size: int = 1024
    steps: int = 300
    hidden_size: int = 96
    layers: int = 3
    run: Mapping[str, Any] = field(
        default_factory=lambda: {
            "warmup_fraction": 0.1,
            "warmup_epochs": 2,
            "warmup_learning_rate": 3e-4,
            "warmup_batch_size": 8,
            "warmup_micro_batch_size": 8,
            "lora_rank": 8,
            "lora_alpha": 32,
            "dim": 2048,
            "max_length": 512,
            "fraction": 0.05,
        }
    )


def run_demo(out: str | Path, settings: DemoSettings | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Invent a corpus, train a tokenizer and a model, run LESS, and count what it selected for each target skill.

    Everything lies in ``out``: the corpus (``pool.jsonl``, ``targets/``), ``model/``, the ``run/`` and
    ``summary.json``. A finished demo is not repeated; one that was interrupted goes on where it stopped.

    Returns the content of summary.json: ``targets`` with ``selected_share`` and ``base_rate`` (shares of the examples
    of that skill) for each skill, and ``seconds`` that the call which finished the demo took. Raises LessFastError
    where ``out`` holds something else.
    """
    started = time.monotonic()
    settings = settings or DemoSettings()
    out = Path(out)
    _open(out, settings)
    if (out / "summary.json").exists():
        say_to_stderr(f"{out}: the demo is finished; this is its result")
        return dict(json.loads((out / "summary.json").read_text()))
    with _one_thread():
        report = _run(out, settings, progress)
    summary = _summary(settings, report)
    summary["seconds"] = round(time.monotonic() - started, 1)
    _write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _run(out: Path, settings: DemoSettings, progress: bool) -> dict[str, Any]:
    corpus = make_corpus(
        settings.seed,
        pool_sizes=settings.pool_sizes,
        target_skills=tuple(settings.target_skills),
        n_target=settings.n_target,
        n_pretraining=settings.n_pretraining,
    )
    targets = {skill: out / "targets" / f"{skill}.jsonl" for skill in corpus.targets}
    (out / "targets").mkdir(exist_ok=True)
    _write_lines(out / "pool.jsonl", corpus.pool)
    for skill, file in targets.items():
        _write_lines(file, corpus.targets[skill])
    say_to_stderr(f"corpus: {len(corpus.pool):,} examples of {len(settings.pool_sizes)} skills in {out / 'pool.jsonl'}")
    if not (out / "model").exists():
        _train(out / "model", [plain_text(example) for example in corpus.pretraining], settings, progress)
    config = RunConfig.from_dict(
        {
            **settings.run,
            "model": str(out / "model"),
            "train": [str(out / "pool.jsonl")],
            "targets": {skill: str(file) for skill, file in targets.items()},
            "out": str(out / "run"),
            "device": "cpu",
        }
    )
    return run(config, progress=progress).report


def summary_table(summary: Mapping[str, Any]) -> str:
    """The result for people: for each target skill, its share of the selection beside its share of the pool."""
    rows = [
        (skill, f"{100 * entry['base_rate']:.1f} %", f"{100 * entry['selected_share']:.1f} %", f"{entry['lift']:.1f} x")
        for skill, entry in summary["targets"].items()
    ]
    selected = next(iter(summary["targets"].values()))["selected"]
    return "\n".join(
        [
            f"LESS selected {selected} of {summary['examples']:,} examples for each target. How many have its skill:",
            "",
            table(("target", "in the pool", "selected", "lift"), rows),
            "",
            f"{summary['seconds']:.0f} s in all; the figures are in summary.json",
        ]
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain little from a second thread, and it costs dearly where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(out: Path, settings: DemoSettings) -> None:
    """Write the settings down, or check that they are those that the folder was begun with."""
    file = out / "demo.json"
    plain = json.loads(json.dumps(asdict(settings)))
    if file.exists():
        if changes := differences(json.loads(file.read_text()), plain):
            raise LessFastError(
                f"{out}: holds a demo with other settings (old -> new): {'; '.join(changes)}; choose another folder"
            )
        return
    if out.exists() and (foreign := sorted(entry.name for entry in out.iterdir() if entry.name != "demo.json.tmp")):
        raise LessFastError(f"{out}: holds {foreign[0]} and is not a demo's folder; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write(file, json.dumps(plain, indent=2) + "\n")


def _train(folder: Path, texts: list[str], settings: DemoSettings, progress: bool) -> None:
    """Tokenizer and model; the folder appears when both are whole."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = train_tokenizer(texts, partial, vocab_size=settings.vocab_size)
    facts = train_model(
        texts,
        tokenizer,
        partial,
        seed=settings.seed,
        steps=settings.steps,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        progress=progress,
    )
    partial.rename(folder)
    say_to_stderr(
        f"model: {facts['parameters']:,.0f} parameters read {facts['tokens']:,.0f} tokens in {facts['seconds']:.0f} s, "
        f"loss {facts['first_loss']:.2f} -> {facts['last_loss']:.2f}"
    )


def _summary(settings: DemoSettings, report: Mapping[str, Any]) -> dict[str, Any]:
    targets = {}
    for skill in settings.target_skills:
        entry = report["targets"][skill]
        share = next(share for share in entry["datasets"] if share["dataset"] == skill)
        targets[skill] = {
            "selected": entry["selected"],
            "selected_share": share["selected_share"],
            "base_rate": share["pool_share"],
            "lift": share["selected_share"] / share["pool_share"],
        }
    return {"examples": report["examples"], "seed": settings.seed, "targets": targets}


def _write_lines(path: Path, examples: Sequence[Mapping[str, Any]]) -> None:
    _write(path, "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
