"""``GradientFeaturesCallback``: features of the training examples while the Hugging Face Trainer trains on them."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback

from less_fast.compat.backend import LessFastBackend, adam_state, model_inputs
from less_fast.compat.numbered_batches import take_numbers, with_numbers
from less_fast.errors import LessFastError
from less_fast.extraction import device_kind, versions
from less_fast.features import BatchFeatures
from less_fast.model.load import fingerprint
from less_fast.projection import Projection
from less_fast.store import FeatureStore, Rows, Status, StoreWriter, atomic_file
from less_fast.store.files import check_free_space
from less_fast.store.manifest import differences

_log = logging.getLogger("less_fast")

_SETTINGS = "settings.json"
# What is known of an example besides its features. ``step``: the optimizer step that saw it, from 1; 0: none has yet.
_ROW = np.dtype(
    [("step", "<i8"), ("loss", "<f4"), ("n_tokens", "<i4"), ("n_labels", "<i4"), ("status", "u1")], align=False
)


class GradientFeaturesCallback(TrainerCallback):
    """Features of every training example at the step that trains on it: the weights and optimizer before its update.

    Training itself is the same bit for bit. The features are those of :class:`~less_fast.FeatureExtractor` (dropout
    off, each example's own mean loss), from a forward and backward pass of their own.

    ``out/epoch-E`` is a :class:`~less_fast.FeatureStore` of the examples that epoch E saw, in the dataset's order;
    ``out/epoch-E.npy`` tells each row's number in the dataset (``example``), optimizer step and loss. Until the
    training ends, rows lie in ``out/epoch-E.partial``, memory-mapped arrays in the dataset's order; where it ends
    within an epoch, that one's arrays stay beside its store. A training that goes on from a checkpoint keeps the rows
    made before it and makes the others again.

    Parameters
    ----------
    out : the folder.
    projection : default ``Projection("srht", 8192)``.
    precondition : ``adam`` (the optimizer's moments; zeros before its first step), ``sgd`` or ``sign``.
    rule : Adam's rule, ``less`` or ``torch``.
    targets : as for FeatureExtractor.
    rows : ids, datasets and subtasks of the training examples; default: their numbers as ids.
    dtype, shard_size : of the stores.
    """

    def __init__(
        self,
        out: str | Path,
        projection: Projection | None = None,
        precondition: str = "adam",
        *,
        rule: str = "less",
        targets: str | None = None,
        rows: Rows | None = None,
        dtype: str = "float32",
        shard_size: int = 1024,
    ) -> None:
        if precondition not in ("adam", "sgd", "sign"):
            raise LessFastError(f"precondition is {precondition!r}; expected 'adam', 'sgd' or 'sign'")
        self.out = Path(out)
        self.projection = projection or Projection()
        self.precondition, self.rule, self.targets = precondition, rule, targets
        self.rows, self.dtype, self.shard_size = rows, dtype, shard_size
        self._trainer: Any = None
        self._pending: list[tuple[NDArray[np.int64], dict[str, Tensor]]] = []
        self._epoch: _Epoch | None = None
        self._number = 0  # of the epoch, from 1. Not from state.epoch: an epoch that is stopped leaves that behind.

    @property
    def stores(self) -> list[FeatureStore]:
        """The finished stores, one per epoch, in order."""
        return [FeatureStore(self._store(epoch)) for epoch in _numbered(self.out, "epoch-*[0-9]")]

    def attach(self, trainer: Any) -> None:
        """Add this callback to a Trainer that is yet to train, and have its batches carry their examples' numbers.

        Overridden on that trainer are ``get_train_dataloader`` and ``get_batch_samples``. Raises LessFastError, saying
        which, for what is not supported: several processes or GPUs, DeepSpeed, FSDP, fp16, torch_compile,
        auto_find_batch_size, a dataset without length.
        """
        if self._trainer is not None:
            raise LessFastError("this callback is attached to a trainer already; make one for each")
        _refuse(trainer)
        dataset = trainer.train_dataset
        size = len(dataset)
        self.rows = self.rows or Rows([str(i) for i in range(size)], ["train"] * size, [None] * size)
        if len(self.rows) != size:
            raise LessFastError(f"rows describe {len(self.rows)} examples, but the training dataset has {size}")
        make_loader, take_batches = trainer.get_train_dataloader, trainer.get_batch_samples

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, n_items = take_batches(*args, **kwargs)
            self._pending = [take_numbers(batch) for batch in batches]
            return batches, n_items

        def get_train_dataloader(*args: Any, **kwargs: Any) -> Any:
            if trainer.train_dataset is not dataset:
                raise LessFastError(
                    "trainer.train_dataset is another than at callback.attach(trainer), so rows would be mislabelled; "
                    "attach the callback after setting it"
                )
            return with_numbers(trainer, lambda: make_loader(*args, **kwargs))

        trainer.get_train_dataloader = get_train_dataloader
        trainer.get_batch_samples = get_batch_samples
        trainer.add_callback(self)
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what is in the folder, and keep of it what was made before the checkpoint that training starts from."""
        if self._trainer is None:
            raise LessFastError(
                "the callback sees no batches yet; call callback.attach(trainer) before trainer.train()"
            )
        # Adam's moments are set at every step.
        constant = "sgd" if self.precondition == "adam" else self.precondition
        self._backend = LessFastBackend(kwargs["model"], self.projection, constant, targets=self.targets)
        self._facts = self._make_facts(kwargs["model"])
        self._number = math.floor(state.epoch or 0)
        begun, stored = (_numbered(self.out, pattern) for pattern in ("epoch-*.partial", "epoch-*[0-9]"))
        finished = [epoch for epoch in stored if epoch not in begun]
        if begun and not stored and not state.global_step:
            _log.warning("%s holds rows of a training that did not end; this one starts over, and so do they", self.out)
            for epoch in begun:
                shutil.rmtree(self._partial(epoch))
            begun = []
        if stored and not state.global_step:
            raise LessFastError(
                f"{self.out} holds features of another training; choose another folder, or resume that training from "
                "its checkpoint"
            )
        if finished and finished[-1] > self._number:
            raise LessFastError(
                f"{self.out} holds the finished features of epoch {finished[-1]}, but the training resumes in epoch "
                f"{self._number + 1}; choose another folder, or resume from a later checkpoint"
            )
        self._check_settings(begun or finished)
        for epoch in begun:
            # A store beside the arrays was made of them, of which some may now be made again.
            shutil.rmtree(self._store(epoch), ignore_errors=True)
            self._table(epoch).unlink(missing_ok=True)
            self._open(epoch).forget_after(state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the arrays of the epoch."""
        self._number += 1
        self._epoch = self._open(self._number)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Features of all batches that the step will accumulate."""
        assert self._epoch is not None
        model, diverged = kwargs["model"], False
        if self.precondition == "adam":
            try:
                moments = adam_state(kwargs["optimizer"], model, self.rule, copy=False, allow_empty=True)
                self._backend.set_precondition(moments)
            except LessFastError:
                diverged = not _finite(kwargs["optimizer"])
                if not diverged:
                    raise
        for numbers, inputs in self._pending:
            batch = model_inputs(inputs, model)
            made = self._backend.engine(batch)
            if diverged:  # training goes on, and so does this; losses and labels do not depend on the moments
                made = replace(made, features=[torch.full_like(made.features[0], math.nan)])
            if len(made.losses) != len(numbers):
                raise LessFastError(
                    f"the data collator makes {len(made.losses)} rows of {len(numbers)} examples; expected a row of "
                    "each: packed batches are not supported here; train without packing"
                )
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            lengths = torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1)
            self._epoch.write(numbers, state.global_step + 1, lengths, made)
        self._pending = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What a checkpoint's steps made goes to the disk with it."""
        if self._epoch is not None:
            self._epoch.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the stores."""
        within = state.epoch is not None and not float(state.epoch).is_integer()
        for epoch in _numbered(self.out, "epoch-*.partial"):
            self._finish(epoch, keep=within and epoch >= self._number)
        self._epoch = None

    def _make_facts(self, model: Any) -> dict[str, Any]:
        adam = {"rule": self.rule, "state": "of the optimizer step that saw the row"}
        layout, device = self._backend.layout(), self._backend.engine.device
        return {
            "model": fingerprint(model)["model"],
            "layout_hash": layout.hash,
            "layout": layout.to_list(),
            "projection": self.projection.to_dict(),
            "precondition": {"kind": self.precondition, **(adam if self.precondition == "adam" else {})},
            "numerics": {"device": device_kind(device), "batches": self._backend.engine.batches.name},
            "backend": self._backend.engine.backends()[0],
            "versions": versions(device),
        }

    def _check_settings(self, goes_on: object) -> None:
        """A training that goes on must make the same features; what they are is written down where it begins."""
        assert self.rows is not None
        names = ("layout_hash", "projection", "precondition")
        settings = {**{name: self._facts[name] for name in names}, "rows": self.rows.hash}
        file = self.out / _SETTINGS
        if not goes_on or not file.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as opened:
                opened.write(json.dumps(settings, indent=1).encode())
        elif lines := differences(json.loads(file.read_text()), settings):
            raise LessFastError(
                f"{self.out} was begun with other settings (old -> new): {'; '.join(lines)}; resume with the old ones, "
                "or choose another folder"
            )

    def _store(self, epoch: int) -> Path:
        return self.out / f"epoch-{epoch}"

    def _table(self, epoch: int) -> Path:
        return self.out / f"epoch-{epoch}.npy"

    def _partial(self, epoch: int) -> Path:
        return self.out / f"epoch-{epoch}.partial"

    def _open(self, epoch: int) -> _Epoch:
        assert self.rows is not None
        return _Epoch.open(self._partial(epoch), len(self.rows), self.projection.dim)

    def _finish(self, epoch: int, *, keep: bool) -> None:
        """The store of an epoch's rows, then the table beside it, then the arrays go; may be repeated from anywhere.

        ``keep`` the arrays of an epoch that has not ended: a training that goes on from there needs them.
        """
        assert self.rows is not None
        partial = self._open(epoch)
        seen = np.flatnonzero(partial.rows["step"])
        if missing := len(partial.rows) - len(seen):
            _log.warning("epoch %d saw %d of %d examples; its store has those", epoch, len(seen), len(partial.rows))
        if len(seen):
            known = self.rows
            ids, datasets, subtasks = known.ids, known.datasets, known.subtasks
            rows = Rows([ids[i] for i in seen], [datasets[i] for i in seen], [subtasks[i] for i in seen])
            facts = {**self._facts, "training": {"epoch": epoch, "examples_not_seen": missing}}
            with StoreWriter(
                self._store(epoch),
                facts,
                rows,
                dim=self.projection.dim,
                dtype=self.dtype,
                shard_size=self.shard_size,
            ) as writer:
                for shard in writer.pending():
                    at = seen[slice(*writer.bounds(shard))]
                    row = partial.rows[at]
                    writer.write(shard, partial.features[at], row["status"], row["n_tokens"], row["n_labels"])
            table = np.empty(len(seen), [("example", "<i8"), *_ROW.descr])
            table["example"] = seen
            for name in _ROW.names or ():
                table[name] = partial.rows[name][seen]
            with atomic_file(self._table(epoch)) as file:
                np.save(file, table)
        if not (keep and len(seen)):
            shutil.rmtree(partial.folder)


@dataclass(frozen=True)
class _Epoch:
    """An epoch's arrays on the disk, in the dataset's order: ``features`` float32 (N, K), ``rows`` ``_ROW`` (N,)."""

    folder: Path
    features: np.memmap[Any, Any]
    rows: np.memmap[Any, Any]

    @classmethod
    def open(cls, folder: Path, n: int, dim: int) -> _Epoch:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = []
        for name, dtype, shape in (("features", np.dtype("<f4"), (n, dim)), ("rows", _ROW, (n,))):
            file = folder / f"{name}.npy"
            if not file.exists():
                check_free_space(folder, dtype.itemsize * math.prod(shape))
                new = file.with_suffix(".new")  # zeros, which take no room yet; a file by its name is a whole one
                np.lib.format.open_memmap(new, "w+", dtype, shape).flush()
                new.rename(file)
            arrays.append(np.lib.format.open_memmap(file, "r+"))
        return cls(folder, *arrays)

    def write(self, numbers: NDArray[np.int64], step: int, lengths: Tensor, made: BatchFeatures) -> None:
        """The rows of a batch; one that comes again replaces the one before."""
        features, losses, n_labels = (x.cpu().numpy() for x in (made.features[0], made.losses, made.n_labels))
        finite = np.isfinite(losses) & np.isfinite(features).all(1)
        status = np.where(n_labels == 0, Status.NO_LABELS, np.where(finite, Status.OK, Status.NON_FINITE))
        self.features[numbers] = np.where((status == Status.OK)[:, None], features, np.float32(0.0))
        columns = {"loss": losses, "n_tokens": lengths.cpu().numpy(), "n_labels": n_labels, "status": status}
        for name, column in columns.items():
            self.rows[name][numbers] = column
        self.rows["step"][numbers] = step  # last: it says that the rest is there

    def forget_after(self, step: int) -> None:
        """Rows of later steps, which training will make again, count as not seen."""
        self.rows["step"][self.rows["step"] > step] = 0

    def flush(self) -> None:
        self.features.flush()
        self.rows.flush()


def _finite(optimizer: Any) -> bool:
    entries = (value for entry in optimizer.state.values() for value in entry.values())
    return all(bool(value.isfinite().all()) for value in entries if isinstance(value, Tensor))


def _refuse(trainer: Any) -> None:
    args, dataset = trainer.args, trainer.train_dataset
    for holds, what, instead in (
        (args.world_size > 1 or args.n_gpu > 1, "several processes or GPUs", "train on one device"),
        (trainer.is_deepspeed_enabled, "DeepSpeed", "train without it"),
        (trainer.is_fsdp_enabled, "FSDP", "train without it"),
        (args.fp16, "fp16, whose small gradients are lost without loss scaling", "use bf16 or float32"),
        (args.torch_compile, "torch_compile, which hooks see nothing of", "train without it"),
        (args.auto_find_batch_size, "auto_find_batch_size, which starts over", "set the batch size"),
        (dataset is None, "a trainer without train_dataset", "give it one"),
        (not hasattr(dataset, "__len__"), "a dataset without length, whose examples have no numbers", "load it whole"),
    ):
        if holds:
            raise LessFastError(f"gradient features cannot be made during training with {what}; {instead}")


def _numbered(out: Path, pattern: str) -> list[int]:
    """The epochs that a pattern finds, ascending."""
    return sorted(int(path.name.removeprefix("epoch-").split(".")[0]) for path in out.glob(pattern))
