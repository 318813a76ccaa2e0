"""What do features cost on top of the model on a GPU? Extraction against the bare forward and backward (bare.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bare import PADDED, bare
from common import random_adam_state
from gpu_models import (
    LLAMA_1B,
    LLAMA_7B,
    MEAN_TOKENS,
    QWEN_HALF_B,
    SHORT_TOKENS,
    TINY,
    Lengths,
    Shape,
    base_lengths,
    label_count,
    long_lengths,
    make_batches,
    make_model,
    real_lengths,
)
from gpu_session import Bar, Session, median_ratio, must_agree
from torch import Tensor, nn

from less_fast.features import MultiFeatureExtractor, Output
from less_fast.model.packed import Layout, Packing
from less_fast.projection import Projection

BAR = 1.05
OWN_ATTENTION = "bare, the model's own attention"
# Examples of a pass: of the mean length, short ones, long ones.
COUNTS = {LLAMA_7B.name: (32, 192, 6), LLAMA_1B.name: (48, 288, 8), QWEN_HALF_B.name: (48, 288, 8)}
MODELS = [(LLAMA_7B, 128), (LLAMA_1B, 64), (QWEN_HALF_B, 64), (LLAMA_1B, 16), (QWEN_HALF_B, 16)]
TINY_MODELS = [(TINY, 4)]


@dataclass(frozen=True)
class Setup:
    """A model, its extractor with Adam and srht, and what the extractor makes."""

    shape: Shape
    rank: int
    model: nn.Module
    extractor: MultiFeatureExtractor
    outputs: list[Output]

    @property
    def name(self) -> str:
        return f"{self.shape.name} r={self.rank}"

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def with_packing(self, packing: Packing) -> Setup:
        """The same with another layout of batches."""
        extractor = MultiFeatureExtractor(self.model, self.outputs, packing=packing)
        return Setup(self.shape, self.rank, self.model, extractor, self.outputs)


def make_setup(session: Session, shape: Shape, rank: int, model: nn.Module | None = None) -> Setup:
    """A random model of the shape, or the one given, with an extractor for Adam (LESS's rule) and srht to 8,192."""
    model = make_model(session, shape, rank) if model is None else model
    outputs = [Output(Projection("srht", 64 if session.tiny else 8192), random_adam_state(model))]
    return Setup(shape, rank, model, MultiFeatureExtractor(model, outputs), outputs)


def distributions(session: Session, shape: Shape) -> list[Lengths]:
    """The lengths that a model is measured on; the first matters most."""
    if session.tiny:
        return [real_lengths(4, 12, base_lengths()), long_lengths(2, 20)]
    n, short, long = COUNTS[shape.name]
    base = base_lengths()
    return [real_lengths(n, MEAN_TOKENS, base), real_lengths(short, SHORT_TOKENS, base), long_lengths(long)]


def estimate(session: Session) -> float:
    """All models and lengths; those of the mean length in both layouts."""
    if session.tiny:
        return 0.0
    seconds = 0.0
    for shape, _ in MODELS:
        cases = distributions(session, shape)
        times = [_case_seconds(session, shape, case, 2 + _twice_bare(shape, case is cases[0])) for case in cases]
        seconds += build_seconds(shape) + sum(times) + _case_seconds(session, shape, cases[0], 2)
    return seconds


def build_seconds(shape: Shape) -> float:
    """Making, checking and letting go of a model; compiling its kernels."""
    return 8.0 + shape.weights * 1e-9


def _twice_bare(shape: Shape, first: bool) -> bool:
    """Whether the model's own attention is timed too: of the largest model's most telling case."""
    return first and shape in (LLAMA_7B, TINY)


def _case_seconds(session: Session, shape: Shape, lengths: Lengths, variants: int) -> float:
    # Each is run repeats + 1 times; one batch's launches take about 50 ms.
    batches = 1 + lengths.tokens // 6000
    return 0.0 if session.tiny else (session.repeats + 1) * variants * (shape.seconds(lengths.tokens) + 0.05 * batches)


def run(session: Session) -> None:
    """Every model and length distribution that there is time for, the most telling first."""
    for shape, rank in TINY_MODELS if session.tiny else MODELS:
        name = f"overhead {shape.name} r={rank}"
        cases = distributions(session, shape)
        first = 0.0 if session.tiny else build_seconds(shape) + _case_seconds(session, shape, cases[0], 3)
        if session.fits(name, first):
            with session.attempt(name):
                _measure_model(session, make_setup(session, shape, rank), cases)
        session.release()


def _measure_model(session: Session, setup: Setup, cases: list[Lengths]) -> None:
    for lengths in cases:
        first = lengths is cases[0]
        _measure_case(session, setup, lengths, checked=first, own_attention=_twice_bare(setup.shape, first))
    # The other layout: padded where the first is packed; packed, where that is possible at all, to try a CPU run out.
    other: Packing = "never" if session.cuda else "always"
    with session.attempt(f"overhead {setup.name}, the other layout"):
        again = setup.with_packing(other)
        if again.extractor.batches != setup.extractor.batches:
            _measure_case(session, again, cases[0], checked=True)


def _measure_case(
    session: Session, setup: Setup, lengths: Lengths, *, checked: bool, own_attention: bool = False
) -> None:
    name = f"{setup.name}, {len(lengths.values)} x {lengths.name}, {setup.extractor.batches.name}"
    seconds = _case_seconds(session, setup.shape, lengths, variants=2 + own_attention)
    if session.fits(f"overhead {name}", seconds):
        with session.attempt(f"overhead {name}"):
            batches = make_batches(session, setup.shape, setup.model, lengths, setup.extractor.batches)
            error = check(setup, batches[0], features=checked)
            session.write("overhead", _measure(session, setup, name, lengths, batches, error, own_attention))
    session.release()


def run_bare(model: nn.Module, batches: list[dict[str, Tensor]], layout: Layout) -> None:
    """The bare forward and backward of every batch."""
    for batch in batches:
        bare(model, batch, layout)


def _measure(
    session: Session,
    setup: Setup,
    name: str,
    lengths: Lengths,
    batches: list[dict[str, Tensor]],
    error: float | None,
    own_attention: bool,
) -> list[dict[str, Any]]:
    variants = {
        "bare": lambda i: run_bare(setup.model, batches, setup.extractor.batches),
        "less_fast": lambda i: [setup.extractor(batch) for batch in batches],
    }
    if own_attention:
        # What a user would write: padded, transformers' own attention, whatever order its backward pass adds up in.
        variants[OWN_ATTENTION] = lambda i: run_bare(setup.model, batches, PADDED)
    seconds = session.interleaved(variants, calls=1)
    work = setup.shape.work(lengths.tokens, label_count(batches), len(batches))
    ratio = median_ratio(seconds, "less_fast", "bare")
    return [
        session.row(
            "overhead",
            variant,
            times,
            shape=name,
            dtype=setup.dtype,
            work=work,
            baseline="bare",
            ratio_to_baseline=median_ratio(seconds, variant, "bare"),
            ratio_to_own_attention=median_ratio(seconds, variant, OWN_ATTENTION) if own_attention else None,
            bar=Bar("of the bare pass", ratio, BAR) if variant == "less_fast" else None,
            examples=len(lengths.values),
            tokens=lengths.tokens,
            batches=len(batches),
            p=setup.extractor.layout.size,
            k=setup.outputs[0].projection.dim,
            backends=setup.extractor.backends(),
            check_error=error if variant == "less_fast" else None,
        )
        for variant, times in seconds.items()
    ]


def check(setup: Setup, batch: dict[str, Tensor], features: bool) -> float | None:
    """Both variants must see the same losses, and where asked for the features must be those of the reference."""
    layout = setup.extractor.batches
    must_agree(f"{setup.name}: losses", setup.extractor(batch).losses, bare(setup.model, batch, layout))
    if not features:
        return None
    few = {name: tensor[:2] for name, tensor in batch.items()}
    packing: Packing = "always" if layout.packed else "auto" if layout.own_attention else "never"
    reference = MultiFeatureExtractor(setup.model, setup.outputs, backend="reference", packing=packing)
    return must_agree(f"{setup.name}: features", setup.extractor(few).features[0], reference(few).features[0])
