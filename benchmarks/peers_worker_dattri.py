"""The worker of dattri-llm: its hooks over the LoRA layers, with the optimizer's map and its projections."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from dattri_llm import AttributionArguments, AttributionTask, HookManager, HookManagerConfig, LESSAttributor
from dattri_llm.gradient.callbacks import CaptureCallback
from dattri_llm.gradient.ops import DattriProjector
from dattri_llm.gradient.optimizer_state import optimizer_from_state_dict
from peers_serve import (
    Job,
    RefusedError,
    Runner,
    in_example_order,
    serve,
    sum_of_means,
    trainable_model,
)
from torch import Tensor

LAYERS = [r"\.lora_[AB]\.default$"]


def own_means(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The sum of the examples' own mean losses."""
    return sum_of_means(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
    )


def documented(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of the examples in its documentation: the model's own, a mean over the tokens of the batch."""
    return model(**batch).loss


def projection(job: Job, style: str, n_layers: int) -> dict[str, Any]:
    """The projection of every layer, of K / layers features each."""
    each = job.dim // n_layers
    if style == "mask":
        return {"style": style, "proj_dim": each}
    dim = isqrt(each) if style == "logra" else each
    return {"style": style, "proj_dim": dim, "proj_max_batch_size": 8, "proj_type": "rademacher"}


def joined(data: dict[str, Tensor]) -> Tensor:
    """The layers' features side by side, in the order of the model's parameters."""
    return torch.cat([value.flatten(1) for _, value in sorted(data.items())], 1)


def mask_columns(adapter: dict[str, Any], each: int) -> Tensor:
    """Which entries of the gradient a mask of ``each`` entries per layer keeps, in the order of :func:`joined`."""
    projector, columns, offset = DattriProjector(), {}, 0
    for name, weight in adapter.items():
        kept = projector.mask_indices(weight.numel(), proj_dim=each, proj_seed=0, device=torch.device("cpu"))
        columns[name.removesuffix(".weight")] = offset + kept
        offset += weight.numel()
    return torch.cat([value for _, value in sorted(columns.items())])


def capture(job: Job, style: str, adam: bool, loss: Callable[[Any, dict[str, Tensor]], Tensor]) -> Runner:
    """Features by a ``HookManager`` over the batches."""
    model, adapter = trainable_model(job)
    layer = projection(job, style, len(adapter))
    config = HookManagerConfig(linear_io=LAYERS, projection_kwargs={"__default__": layer}, capture_style="materialized")
    optimizer = optimizer_from_state_dict(model, torch.load(job.optimizer_file, weights_only=True))
    captured = CaptureCallback()
    hooks = HookManager(model, config=config, callbacks=[captured], optimizer=optimizer if adam else None)
    batches = [job.batch(numbers) for numbers in job.batches]

    def work() -> list[Tensor]:
        rows = []
        with hooks.collect():
            for batch in batches:
                model.zero_grad(set_to_none=True)
                loss(model, batch).backward()
                assert captured.record is not None
                rows.append(joined(captured.record.gradient.data))
        return rows

    columns = mask_columns(adapter, layer["proj_dim"]) if style == "mask" else None
    return Runner(work, lambda rows: in_example_order(job, rows), columns)


def attributor(job: Job) -> Runner:
    """The stream of preconditioned gradients that ``LESSAttributor`` scores from, one example a batch.

    It gives its streamer no way to pad: ``generate_train_rep`` passes on no ``collate_fn``.
    """
    model, adapter = trainable_model(job)
    config = HookManagerConfig(
        linear_io=LAYERS, projection_kwargs={"__default__": projection(job, "dense", len(adapter))}
    )
    optimizer = optimizer_from_state_dict(model, torch.load(job.optimizer_file, weights_only=True))
    task = AttributionTask(loss_func=documented, model=model)
    arguments = AttributionArguments(
        output_dir=str(job.folder / "dattri"), per_device_train_batch_size=1, use_cpu=True, dataloader_pin_memory=False
    )
    less = LESSAttributor(arguments, task=task, optimizers=[optimizer])
    data = [{name: tensor[0] for name, tensor in job.batch([n]).items()} for n in range(len(job.examples))]

    def work() -> list[Tensor]:
        with less.generate_train_rep(data, hook_config=config) as stream:
            return [joined(gradient.data) for _, gradient, _ in stream]

    return Runner(work, torch.cat)


def start(job: Job, variant: str) -> Runner:
    """See the table of variants in peers.py."""
    if variant == "attributor":
        return attributor(job)
    if variant == "global":
        raise RefusedError(
            "projections are per layer (projection_kwargs maps a layer's name to its own projection): no matrix over "
            "the joined gradient"
        )
    style, rule, *loss = variant.split("-")
    return capture(job, style, rule == "adam", documented if loss else own_means)


if __name__ == "__main__":
    serve("dattri-llm", start)
