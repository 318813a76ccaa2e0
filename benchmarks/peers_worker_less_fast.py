"""The worker of less_fast itself: features of the job's batches by ``FeatureExtractor``."""

from __future__ import annotations

from peers_serve import Job, Runner, in_example_order, serve
from torch import Tensor

from less_fast import AdamState, FeatureExtractor, Projection, load_model

VARIANTS = {
    "adam": ("srht", "less"),
    "torch-adam": ("srht", "torch"),
    "sgd": ("srht", None),
    "dense-adam": ("rademacher", "less"),
}


def start(job: Job, variant: str) -> Runner:
    """All variants are one pass over the batches; they differ in projection and rule."""
    kind, rule = VARIANTS[variant]
    model, _ = load_model(job.model, job.checkpoint, device="cpu")
    precondition = "sgd" if rule is None else AdamState.from_checkpoint(job.checkpoint, model, rule)
    extractor = FeatureExtractor(model, Projection(kind, job.dim), precondition)
    batches = [job.batch(numbers) for numbers in job.batches]

    def work() -> list[Tensor]:
        return [extractor(batch) for batch in batches]

    return Runner(work, lambda rows: in_example_order(job, rows))


if __name__ == "__main__":
    serve("less_fast", start)
