"""How much device memory does extraction take at its peak, beside the bare forward and backward of the same batches?"""

from __future__ import annotations

import resource
from typing import Any

from common import peak_bytes
from gpu_models import (
    LLAMA_1B,
    LLAMA_7B,
    MEAN_TOKENS,
    QWEN_HALF_B,
    TINY,
    Shape,
    base_lengths,
    label_count,
    make_batches,
    make_model,
    real_lengths,
)
from gpu_overhead import build_seconds, make_setup, run_bare
from gpu_session import Bar, Session

from less_fast.model.packed import choose_layout

BAR = 1.25
MODELS = [(LLAMA_7B, 128), (LLAMA_1B, 64), (QWEN_HALF_B, 64)]
TINY_MODELS = [(TINY, 4)]
N = 16


def estimate(session: Session) -> float:
    """Each model is made once and runs both variants over a batch or two."""
    return 0.0 if session.tiny else sum(_seconds(session, shape) for shape, _ in MODELS)


def _seconds(session: Session, shape: Shape) -> float:
    return build_seconds(shape) + 2 * (session.repeats + 1) * shape.seconds(N * MEAN_TOKENS)


def run(session: Session) -> None:
    """Every model at its largest rank."""
    for shape, rank in TINY_MODELS if session.tiny else MODELS:
        if session.tiny or session.fits(f"memory {shape.name} r={rank}", _seconds(session, shape)):
            with session.attempt(f"memory {shape.name} r={rank}"):
                session.write("memory", _measure(session, shape, rank))
        session.release()


def _measure(session: Session, shape: Shape, rank: int) -> list[dict[str, Any]]:
    lengths = real_lengths(4, 12, base_lengths()) if session.tiny else real_lengths(N, MEAN_TOKENS, base_lengths())
    model = make_model(session, shape, rank)
    layout = choose_layout(model, session.device, "auto")
    batches = make_batches(session, shape, model, lengths, layout)
    facts: dict[str, Any] = {
        "shape": f"{shape.name} r={rank}, {len(lengths.values)} x {lengths.name}, {len(batches)} batches",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "work": shape.work(lengths.tokens, label_count(batches), len(batches)),
        "baseline": "bare",
        "examples": len(lengths.values),
        "tokens": lengths.tokens,
    }
    # Before the extractor exists, so that nothing of it counts as the bare pass's.
    session.release()
    seconds = session.interleaved({"bare": lambda i: run_bare(model, batches, layout)}, calls=1)
    least = peak_bytes(session.device)
    rows = [session.row("memory", "bare", seconds["bare"], ratio_to_baseline=1.0, **facts)]
    setup = make_setup(session, shape, rank, model)
    session.release()
    seconds = session.interleaved({"less_fast": lambda i: [setup.extractor(batch) for batch in batches]}, calls=1)
    tables = 8 * setup.extractor.layout.size
    ratio = (peak_bytes(session.device) - tables) / least
    bar = Bar("of the bare peak, beyond m and v", ratio, BAR)
    facts.update(ratio_to_baseline=ratio, bar=bar, table_bytes=tables, host_peak_bytes=_host_peak())
    return [*rows, session.row("memory", "less_fast", seconds["less_fast"], **facts)]


def _host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
