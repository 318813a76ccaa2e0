"""The worker of bergson: what ``bergson build`` does once model and data are loaded, index on disk included."""

from __future__ import annotations

import dataclasses
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from bergson.collection import collect_gradients
from bergson.config.config import IndexConfig
from bergson.data import load_gradients
from bergson.gradients import AdamNormalizer
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
from datasets import Dataset
from peers_serve import Job, RefusedError, Runner, serve
from torch import Tensor


def one_group(job: Job) -> Path:
    """The same optimizer state with its parameter groups joined to one."""
    file = job.folder / "one_group.pt"
    state = torch.load(job.optimizer_file, weights_only=True)
    params = [number for group in state["param_groups"] for number in group["params"]]
    torch.save({**state, "param_groups": [{**state["param_groups"][0], "params": params}]}, file)
    return file


def build(job: Job, target: str, optimizer_state: str) -> Runner:
    """A runner of ``collect_gradients`` with the loss as an example's mean."""
    config = IndexConfig(
        run_path=str(job.folder / f"bergson-{target}-{bool(optimizer_state)}"),
        model=str(job.checkpoint),
        precision="fp32",
        projection_dim=job.dim,
        projection_target=target,
        loss_reduction="mean",
        optimizer_state=optimizer_state,
    )
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    model, modules = setup_model_and_peft(config)
    assert modules
    if target == "per_module":
        config.projection_dim = isqrt(job.dim // len(modules))
    processor = create_processor(model, config, modules)
    ids, labels = (list(column) for column in zip(*job.examples))
    data = Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]})

    def work() -> None:
        collect_gradients(model, data, processor, config, batches=job.batches, target_modules=modules)

    def features(_: None) -> Tensor:
        return torch.from_numpy(np.array(load_gradients(config.partial_run_path)))

    return Runner(work, features)


def start(job: Job, variant: str) -> Runner:
    """A target with plain gradients or the second moment; ``trainer-state`` and ``less`` say why they are not there."""
    if variant == "less":
        kept = ", ".join(field.name for field in dataclasses.fields(AdamNormalizer))
        raise RefusedError(
            f"no first moment: its AdamNormalizer keeps {kept} only and divides the gradient by sqrt(v) + eps, so the "
            "example's own g² is left out as well"
        )
    if variant == "trainer-state":
        return build(job, "global", str(job.optimizer_file))
    target, rule = variant.split("-")
    return build(job, target, str(one_group(job)) if rule == "second" else "")


if __name__ == "__main__":
    serve("bergson", start)
