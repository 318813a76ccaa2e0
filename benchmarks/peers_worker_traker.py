"""The worker of traker: LESS's loop around its ``BasicProjector``, and ``TRAKer.featurize`` itself."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import torch
from peers_serve import Job, Runner, serve, sum_of_means, trainable_model
from peers_worker_less_loop import AT_ONCE, BLOCK, loop
from torch import Tensor
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, CudaProjector, ProjectionType


def basic_projector(job: Job, p: int) -> Any:
    """The projector that LESS falls back to where fast_jl is missing, in float32."""
    return BasicProjector(p, job.dim, 0, ProjectionType.rademacher, "cpu", block_size=BLOCK, dtype=torch.float32)


def n_weights(job: Job) -> int:
    """P: how many LoRA weights there are."""
    return sum(p.numel() for p in trainable_model(job)[1].values())


class MeanLoss(AbstractModelOutput):
    """An example's own mean loss as the model's output; traker has no task for language models."""

    def __init__(self) -> None:
        """There is nothing to keep; the base class wants it said."""

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """The loss of one example, called under ``vmap``.

        Without the mask, which transformers asks a question that vmap cannot answer; padding on the right has no say.
        """
        inputs = {"input_ids": ids[None], "use_cache": False}
        logits = torch.func.functional_call(model, (weights, buffers), kwargs=inputs).logits
        return sum_of_means(logits, labels[None])

    def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
        """The output is the loss."""
        return torch.ones(len(batch[0]), 1)


def featurize(job: Job) -> Runner:
    """TRAK's features of plain gradients, vectorised over each batch by ``vmap``."""
    model, adapter = trainable_model(job)
    size = sum(p.numel() for p in adapter.values())
    batches = [(np.array(numbers), tuple(job.batch(numbers).values())) for numbers in job.batches]
    folder = job.folder / "trak"

    def work() -> TRAKer:
        shutil.rmtree(folder, ignore_errors=True)
        traker = TRAKer(
            model,
            MeanLoss(),
            len(job.examples),
            save_dir=str(folder),
            device="cpu",
            projector=basic_projector(job, size),
            use_half_precision=False,
            grad_wrt=list(adapter),
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for numbers, batch in batches:
            traker.featurize(batch, inds=numbers)
        return traker

    def features(traker: TRAKer) -> Tensor:
        return torch.from_numpy(traker.saver.current_store["grads"][:])

    return Runner(work, features)


def start(job: Job, variant: str) -> Runner:
    """``less-loop``, ``featurize``, or ``fast_jl``, which is there to say why it is not measured."""
    if variant == "featurize":
        return featurize(job)
    if variant == "less-loop":
        projector = basic_projector(job, n_weights(job))
        return loop(job, lambda vectors: projector.project(vectors, model_id=0))
    projector = CudaProjector(n_weights(job), job.dim, 0, ProjectionType.rademacher, "cpu", AT_ONCE)
    return loop(job, lambda vectors: projector.project(vectors, model_id=0))


if __name__ == "__main__":
    serve("traker", start)
