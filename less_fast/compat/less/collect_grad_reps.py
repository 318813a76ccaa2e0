"""LESS's collecting functions under their own names, in batches: gradient features, hidden states, losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from less_fast.compat.less.files import merge_parts
from less_fast.compat.less.forward import ForwardExtractor
from less_fast.compat.less.job import Folder, Run, compute, shared_facts, working_folder, write_folders
from less_fast.compat.less.tokens import TokenSource, from_dataloader
from less_fast.errors import LessFastError
from less_fast.features import MultiFeatureExtractor, Output
from less_fast.model.sites import find_sites
from less_fast.optim import AdamState
from less_fast.optim.adam import Precondition, precondition_facts
from less_fast.optim.moments import Moments, clean_name
from less_fast.projection import Projection
from less_fast.store import Status, atomic_file

GRADIENT_TYPES = ("adam", "sign", "sgd")
LOSSES_NAME = "losses.json"

_MAX_BLOCK = 64


def collect_grads(
    dataloader: Any,
    model: nn.Module,
    output_dir: str | PathLike[str],
    proj_dim: Sequence[int] = (8192,),
    adam_optimizer_state: Mapping[str, Any] | AdamState | None = None,
    gradient_type: str = "adam",
    max_samples: int | None = None,
    *,
    projection: str = "srht",
    token_budget: int | str = "auto",
    progress: bool = True,
) -> None:
    """Write the gradient features of a loader's examples to ``{output_dir}/dim{D}``, LESS's files, for every D.

    Parameters
    ----------
    dataloader : batches of ``input_ids``, ``labels`` and ``attention_mask``, of any size.
    adam_optimizer_state : for ``gradient_type`` adam: parameter name -> ``exp_avg`` and ``exp_avg_sq``, or an
        :class:`~less_fast.AdamState`.
    gradient_type : ``adam``, ``sign`` or ``sgd``.
    max_samples : take only the first so many examples.
    projection : ``srht`` or ``rademacher``, divided by √D.
    token_budget : tokens a batch may have, or ``auto``.

    An interrupted call is repeated to go on. Rows without labels or with non-finite values are zeros, and listed in
    the folder's ``less_fast.json``.
    """
    _check_count(max_samples)
    precondition = _precondition(model, gradient_type, adam_optimizer_state)
    source = from_dataloader(dataloader, max_samples)
    write_gradients(source, model, output_dir, proj_dim, precondition, projection, token_budget, progress)


def write_gradients(
    source: TokenSource,
    model: nn.Module,
    output_dir: str | PathLike[str],
    dims: Sequence[int],
    precondition: Precondition,
    projection: str = "srht",
    token_budget: int | str = "auto",
    progress: bool = True,
) -> None:
    """:func:`collect_grads` of a :class:`~less_fast.compat.less.tokens.TokenSource`."""
    out = Path(output_dir)
    layout = {"layout_hash": find_sites(model)[1].hash, "precondition": precondition_facts(precondition)}
    folders = []
    for dim in dict.fromkeys(dims):
        # The longest runs that the dim allows; LESS's dims are multiples of 512.
        chosen = Projection(projection, dim, block=math.gcd(dim, _MAX_BLOCK))
        facts = {**layout, "projection": chosen.to_dict()}
        folders.append(Folder(f"dim{dim}", out / f"dim{dim}", Output(chosen, precondition), facts))
    run = Run(model, source, partial(MultiFeatureExtractor, model), token_budget, progress)
    write_folders(out, folders, "grads", run)


def collect_reps(
    dataloader: Any,
    model: nn.Module,
    output_dir: str | PathLike[str],
    max_samples: int | None = None,
    *,
    token_budget: int | str = "auto",
    progress: bool = True,
) -> None:
    """Write the last layer's hidden state at each example's last token to ``output_dir``: ``reps-{count}.pt`` and
    ``all_orig.pt``. Parameters as for :func:`collect_grads`.
    """
    _check_count(max_samples)
    write_reps(from_dataloader(dataloader, max_samples), model, output_dir, token_budget, progress)


def write_reps(
    source: TokenSource,
    model: nn.Module,
    output_dir: str | PathLike[str],
    token_budget: int | str = "auto",
    progress: bool = True,
) -> None:
    """:func:`collect_reps` of a :class:`~less_fast.compat.less.tokens.TokenSource`."""
    extractor = ForwardExtractor(model, "reps")
    folder = Folder("reps", Path(output_dir), extractor.outputs[0], {"features": "last hidden state"})
    run = Run(model, source, lambda outputs: extractor, token_budget, progress)
    write_folders(Path(output_dir), [folder], "reps", run)


def get_loss(
    dataloader: Any,
    model: nn.Module,
    output_dir: str | PathLike[str],
    *,
    token_budget: int | str = "auto",
    progress: bool = True,
) -> None:
    """Write ``loss.txt`` (the mean loss of all label tokens, and their number) and ``losses.json``: see
    :func:`write_losses`.
    """
    write_losses(from_dataloader(dataloader), model, output_dir, token_budget, progress)


def write_losses(
    source: TokenSource,
    model: nn.Module,
    output_dir: str | PathLike[str],
    token_budget: int | str = "auto",
    progress: bool = True,
) -> None:
    """``loss.txt``, as LESS writes it, and ``losses.json``: the mean loss of every example, in order.

    An example without labels, or whose loss is not finite, is null there and left out of the mean. Raises
    LessFastError where no example has a loss.
    """
    extractor = ForwardExtractor(model, "loss")
    run = Run(model, source, lambda outputs: extractor, token_budget, progress)
    facts = {**shared_facts(run), "features": "loss"}
    with working_folder(Path(output_dir)) as work:
        (store,) = compute(work, [("loss", extractor.outputs[0], facts)], run)
        fine = store.status == Status.OK
        losses, counts = store[:][:, 0].astype(np.float64), store.n_labels.astype(np.int64)
        n_tokens = int(counts[fine].sum())
        if n_tokens:
            result = {"num_tokens": n_tokens, "loss": float((losses * counts)[fine].sum() / n_tokens)}
            each = [float(loss) if ok else None for loss, ok in zip(losses, fine)]
            for name, content in ((LOSSES_NAME, each), ("loss.txt", result)):
                with atomic_file(Path(output_dir) / name) as file:
                    file.write(json.dumps(content, indent=4).encode())
    if not n_tokens:  # after the work is put away, or a corrected command would meet it
        raise LessFastError(
            f"none of {len(store)} examples has a label token with a loss; look at their format, or raise max_length"
        )


def merge_and_normalize_info(output_dir: str | PathLike[str], prefix: str = "reps") -> None:
    """Join ``{prefix}-{count}.pt`` of a folder to ``all_orig.pt``, every row divided by its norm."""
    merge_parts(output_dir, prefix, normalised=True)


def merge_info(output_dir: str | PathLike[str], prefix: str = "reps") -> None:
    """Join ``{prefix}-{count}.pt`` of a folder to ``all_unormalized.pt``, rows as they are."""
    merge_parts(output_dir, prefix, normalised=False)


def prepare_optimizer_state(
    model: nn.Module, optimizer_state: Mapping[str, Any] | AdamState, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Both of Adam's moments of the LoRA weights, each as one vector (P,) in ``named_parameters()`` order."""
    state = _adam_state(model, optimizer_state)
    moments = [state.moments[clean_name(parameter.name)] for parameter in find_sites(model)[1].parameters]
    first, second = (torch.cat([moment.reshape(-1) for moment in each]) for each in zip(*((e.m, e.v) for e in moments)))
    return first.to(device), second.to(device)


def _precondition(model: nn.Module, gradient_type: str, state: Mapping[str, Any] | AdamState | None) -> Precondition:
    if gradient_type not in GRADIENT_TYPES:
        raise LessFastError(f"gradient_type is {gradient_type!r}; expected one of {', '.join(GRADIENT_TYPES)}")
    if gradient_type != "adam":
        return gradient_type
    if state is None:
        raise LessFastError("gradient_type 'adam' needs adam_optimizer_state; use 'sgd' for plain gradients")
    return _adam_state(model, state)


def _adam_state(model: nn.Module, state: Mapping[str, Any] | AdamState) -> AdamState:
    """LESS's rule on a state by parameter name, such as the ``state`` of an ``optimizer.bin``."""
    if isinstance(state, AdamState):
        return state
    named = {clean_name(name): entry for name, entry in state.items() if isinstance(name, str)}
    moments = {}
    for parameter in find_sites(model)[1].parameters:
        entry = named.get(clean_name(parameter.name), {})
        if "exp_avg" not in entry or "exp_avg_sq" not in entry:
            raise LessFastError(
                f"the optimizer state has no exp_avg and exp_avg_sq of {parameter.name}; read the checkpoint by "
                "AdamState.from_checkpoint(path, model), which takes states of every kind"
            )
        m, v = entry["exp_avg"], entry["exp_avg_sq"]
        if m.numel() != parameter.size or v.numel() != parameter.size:
            raise LessFastError(
                f"the optimizer state of {parameter.name} has {m.numel()} and {v.numel()} entries, the parameter "
                f"{parameter.size}; use the optimizer saved with this adapter"
            )
        shape = (parameter.rows, parameter.cols)
        moments[clean_name(parameter.name)] = Moments(m.float().reshape(shape), v.float().reshape(shape), None)
    return AdamState(moments, source="adam_optimizer_state")


def _check_count(max_samples: int | None) -> None:
    if max_samples is not None and max_samples < 1:
        raise LessFastError(f"max_samples is {max_samples}; expected at least 1")
