"""A LESS selector for DataFlex, which asks it during training which examples to train on next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from less_fast.compat.backend import LessFastBackend, adam_state, model_inputs, usable
from less_fast.errors import LessFastError
from less_fast.projection import Projection, widest_block
from less_fast.scoring import select
from less_fast.store.files import atomic_file

_GRADIENT_TYPES = ("adam", "sgd", "sign")


def register(name: str = "less_fast") -> None:
    """Make :class:`LessSelector` known to DataFlex under ``name``; call it before the training starts.

    Raises LessFastError where DataFlex cannot be imported.
    """
    try:
        from dataflex.core.registry import register_selector  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise LessFastError(
            f"DataFlex, to which LessSelector is to be made known, cannot be imported ({error}); install it: "
            "pip install dataflex"
        ) from error

    register_selector(name)(LessSelector)


class LessSelector:
    """Selects the examples whose Adam updates point most along the target's gradients.

    Parameters
    ----------
    dataset, eval_dataset : tokenised examples and target examples, by number; ``target_dataset`` is another name for
        the latter, which some versions of DataFlex use.
    accelerator : accelerate's, or None. One process.
    data_collator : a list of examples -> ``input_ids``, ``labels`` and ``attention_mask``.
    cache_dir : where each selection is written as ``step_{step_id}.json`` (``indices``, and their scores under
        ``metric``); None: nowhere. The file is a record: it is never read.
    gradient_type : ``adam``, ``sgd`` or ``sign``, of the training examples; targets have plain gradients.
    proj_dim, seed, proj_type : K, seed and kind of the projection; ``normal`` is another name for ``gaussian``.
    save_interval : examples in a batch.
    """

    def __init__(
        self,
        dataset: Any,
        eval_dataset: Any = None,
        accelerator: Any = None,
        data_collator: Any = None,
        cache_dir: str | Path | None = None,
        gradient_type: str = "adam",
        proj_dim: int = 8192,
        save_interval: int = 16,
        seed: int = 42,
        target_dataset: Any = None,
        proj_type: str = "srht",
    ) -> None:
        if gradient_type not in _GRADIENT_TYPES:
            raise LessFastError(f"gradient_type is {gradient_type!r}; expected one of {', '.join(_GRADIENT_TYPES)}")
        if save_interval < 1:
            raise LessFastError(f"save_interval is {save_interval}; expected at least one example in a batch")
        if data_collator is None:
            raise LessFastError(
                "data_collator is None; expected what makes input_ids, labels and attention_mask of a list of examples"
            )
        self.dataset, self.accelerator, self.data_collator = dataset, accelerator, data_collator
        self.eval_dataset = target_dataset if eval_dataset is None else eval_dataset
        if self.eval_dataset is None or not len(self.eval_dataset):
            raise LessFastError("there is no target: eval_dataset is missing or empty; give the examples to select for")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.gradient_type, self.save_interval, self.seed = gradient_type, save_interval, seed
        self._pool: list[int] | None = None
        kind = "gaussian" if proj_type == "normal" else proj_type
        block = {"block": widest_block(proj_dim)} if kind == "srht" else {}
        self.projection = Projection(kind, proj_dim, seed, **block)

    def set_candidate_pool(self, indices: Sequence[int] | None) -> None:
        """Select among these examples from now on, as another stage of a pipeline left them; None: among all."""
        self._pool = None if indices is None else [int(index) for index in indices]

    def warmup(self, num_samples: int, replacement: bool) -> list[int]:
        """Examples for the steps before the first selection: drawn by torch's generator from the seed."""
        size, generator = len(self.dataset), torch.Generator().manual_seed(self.seed)
        if replacement:
            return torch.randint(size, (num_samples,), generator=generator).tolist()
        if num_samples > size:
            raise LessFastError(f"{num_samples} examples are to be drawn without replacement, but there are {size}")
        return torch.randperm(size, generator=generator)[:num_samples].tolist()

    def select(self, model: nn.Module, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        """Numbers of the ``num_samples`` examples with the highest mean cosine with the target, best first.

        Equal scores are in the dataset's order. Examples without labels or with non-finite gradients are never
        selected; where too few are left, a warning says so. The model is as before, and no random number is drawn.

        Parameters
        ----------
        optimizer_state : (in ``kwargs``) the optimizer, or its ``state``: parameter -> moments; required by ``adam``.
            Other keywords are DataFlex's for other selectors.

        Raises
        ------
        LessFastError
            for several processes or DeepSpeed, an optimizer state that is missing, empty or not Adam's, a target
            without a usable gradient, and nothing to select from.
        """
        self._check_processes()
        pool = range(len(self.dataset)) if self._pool is None else self._pool
        if not len(pool):
            raise LessFastError(
                f"there is nothing to select from: the {'dataset' if self._pool is None else 'candidate pool'} is "
                "empty; give at least one example"
            )
        model = model if self.accelerator is None else self.accelerator.unwrap_model(model)
        backend = LessFastBackend(model, self.projection)
        everything = range(len(self.eval_dataset))
        targets = torch.cat([backend.features(batch) for batch in self._batches(model, self.eval_dataset, everything)])
        targets = targets[usable(targets)]
        if not len(targets):
            raise LessFastError(
                f"none of {len(self.eval_dataset)} target examples has a usable gradient; "
                "expected labels other than -100 and finite losses"
            )
        if self.gradient_type == "adam":
            if (optimizer := kwargs.get("optimizer_state")) is None:
                raise LessFastError(
                    "select got no optimizer_state, which gradient_type 'adam' needs; pass it, or 'sgd'"
                )
            backend.set_precondition(adam_state(optimizer, model, copy=False))
        else:
            backend.set_precondition(self.gradient_type)
        batches = self._batches(model, self.dataset, pool)
        scores = np.concatenate([self._mean_cosines(backend, batch, targets) for batch in batches])
        rows = select(scores, n=num_samples)
        indices = [pool[row] for row in rows]
        self._record(step_id, indices, scores[rows].tolist())
        return indices

    def _check_processes(self) -> None:
        if getattr(self.accelerator, "num_processes", 1) > 1:
            raise LessFastError(
                f"LessSelector runs in one process, and there are {self.accelerator.num_processes}; start one"
            )
        if getattr(getattr(self.accelerator, "state", None), "deepspeed_plugin", None) is not None:
            raise LessFastError("LessSelector does not read DeepSpeed's partitioned weights; train without DeepSpeed")

    def _batches(self, model: nn.Module, dataset: Any, indices: Sequence[int]) -> Iterator[Mapping[str, Tensor]]:
        for start in range(0, len(indices), self.save_interval):
            batch = self.data_collator([dataset[i] for i in indices[start : start + self.save_interval]])
            yield model_inputs(batch, model)

    @staticmethod
    def _mean_cosines(backend: LessFastBackend, batch: Mapping[str, Tensor], targets: Tensor) -> np.ndarray[Any, Any]:
        return backend.scores(backend.features(batch), targets).numpy().mean(axis=1, dtype=np.float64)

    def _record(self, step_id: int, indices: list[int], scores: list[float]) -> None:
        if self.cache_dir is None:
            return
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.cache_dir / f"step_{step_id}.json") as file:
            file.write(json.dumps({"indices": indices, "metric": {"mean_cosine": scores}}).encode())
