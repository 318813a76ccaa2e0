"""Warm-up: LoRA training on a random fraction of the pool, which leaves one checkpoint per epoch.

LESS section 4.1, step 1: influence is measured at these checkpoints, with their Adam states.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from less_fast.checkpoints import Checkpoint, checkpoint_folders, discover_checkpoints, read_state
from less_fast.data import Encoded, Examples, collate, encode_all
from less_fast.errors import LessFastError
from less_fast.model.load import fingerprint, load_model, pick_device
from less_fast.model.lora import LoraSettings, add_adapter, target_modules
from less_fast.progress import progress_bar
from less_fast.store.files import atomic_file

SETTINGS_NAME = "warmup.json"

_LESS_LORA = LoraSettings()

_log = logging.getLogger(__name__)


def warmup(
    model_path: str | Path,
    examples: Examples,
    out: str | Path,
    *,
    fraction: float = 0.05,
    epochs: int = 4,
    learning_rate: float = 2e-5,
    batch_size: int = 128,
    micro_batch_size: int = 1,
    lora: LoraSettings = _LESS_LORA,
    template: str = "tulu",
    max_length: int = 2048,
    warmup_ratio: float = 0.03,
    seed: int = 0,
    subset_seed: int = 42,
    dtype: str = "float32",
    bf16: bool | None = None,
    device: str = "auto",
    progress: bool = True,
) -> list[Checkpoint]:
    """Train a LoRA adapter with the Hugging Face Trainer on a random fraction of the examples, a checkpoint per epoch.

    A run that is complete is not repeated, one that was interrupted goes on after its last whole checkpoint. Each
    ``out/checkpoint-*`` holds the adapter, ``optimizer.pt``, ``trainer_state.json`` and the tokenizer.

    ``fraction``, ``subset_seed``: the rows are those of :func:`draw_subset`; 42 is the seed that LESS draws its subset
    with, whatever seed it trains with. ``learning_rate``, ``warmup_ratio``: AdamW without weight decay; the rate rises
    over the first ``warmup_ratio`` of the steps and falls linearly to 0. ``batch_size``: examples per optimizer step
    over all devices, reached by accumulating micro batches. ``micro_batch_size``: examples that a device computes at
    once; at 1, as in LESS, every example counts alike, above 1 every token of a micro batch does. ``template``,
    ``max_length``: see :func:`less_fast.data.encode`. ``seed``: of the adapter's initial values, the order of the
    examples and the dropout. ``dtype``: of the frozen weights. ``bf16``: whether to compute in bfloat16 (None: on a GPU
    that can, as LESS does). ``device``: auto, cpu or cuda. ``progress``: show a bar.

    Returns the checkpoints in order of training. Raises LessFastError for a fraction that leaves no example, a batch
    size that micro batches do not divide, examples without any label, a model without the target modules, and an
    ``out`` that holds a run with other settings.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise LessFastError(f"warm-up {name} is {value}; expected at least 1")
    for name, value in (("seed", seed), ("subset_seed", subset_seed)):
        if not 0 <= value < 2**32:
            raise LessFastError(f"warm-up {name} is {value}; expected 0 to 2^32 - 1")
    rows = draw_subset(len(examples), fraction, subset_seed)
    out = Path(out)
    # The Trainer moves the model to its device itself, also when several processes train together.
    model, tokenizer = load_model(model_path, dtype=dtype, device="cpu")
    if hasattr(model, "peft_config"):
        raise LessFastError(f"{model_path}: is already a LoRA adapter; warm-up starts from a model without one")
    on_gpu = pick_device(device).type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        optim="adamw_torch",
        per_device_train_batch_size=micro_batch_size,
        bf16=_computes_in_bf16(on_gpu) if bf16 is None else bf16,
        use_cpu=not on_gpu,
        seed=seed,
        save_strategy="epoch",
        logging_strategy="steps",
        logging_steps=1,  # so that the mean of the logged learning rates is that of all steps
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,  # _Progress has its own bar
    )
    examples_at_once = arguments.train_batch_size * arguments.world_size
    if batch_size % examples_at_once:
        raise LessFastError(
            f"batch_size is {batch_size}; expected a multiple of {examples_at_once}, the examples computed at once "
            f"({micro_batch_size} on each of {examples_at_once // micro_batch_size} devices)"
        )
    arguments.gradient_accumulation_steps = batch_size // examples_at_once

    encoded = encode_all(examples.take(rows), tokenizer, template, max_length)
    # An example without labels has no loss: its mean over no tokens would be NaN and spoil the run.
    train = [item for item in encoded if item.n_labels]
    if not train:
        raise LessFastError(
            f"none of the {len(rows)} warm-up examples has a label within {max_length} tokens; "
            "raise max_length or check that the examples have answers"
        )
    if left_out := len(encoded) - len(train):
        _log.warning(
            "%d of %d warm-up examples have no label within %d tokens and are left out",
            *(left_out, len(encoded), max_length),
        )
    n_steps = epochs * math.ceil(len(train) / batch_size)
    arguments.warmup_steps = math.ceil(warmup_ratio * n_steps)

    targets = target_modules(model, lora.target_modules, model_path)
    settings = {
        "model": fingerprint(model)["model"],
        "examples": examples.fingerprint,
        "tokens": _digest(train),
        "fraction": fraction,
        "subset_seed": subset_seed,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "warmup_ratio": warmup_ratio,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        **{f"lora.{name}": value for name, value in {**asdict(lora), "target_modules": targets}.items()},
        "template": template,
        "max_length": max_length,
        "seed": seed,
        "dtype": dtype,
        "bf16": arguments.bf16,
    }
    whole = _open_run(out, settings, is_main=arguments.process_index == 0)
    if whole and whole[-1][0] >= n_steps:
        return discover_checkpoints(out)

    set_seed(seed)
    shown = _Progress(tokenizer, progress)
    trainer = Trainer(
        model=add_adapter(model, lora, targets, model_path),
        args=arguments,
        train_dataset=train,
        data_collator=_Collator(_pad_id(tokenizer)),
        callbacks=[shown],
    )
    trainer.remove_callback(PrinterCallback)
    # Otherwise micro batches are weighted by their token counts; in LESS each micro batch counts alike.
    trainer.model_accepts_loss_kwargs = False
    if progress and trainer.is_world_process_zero():
        tqdm.write(
            f"warm-up: {len(train):,} of {len(examples):,} examples, {n_steps} steps of {batch_size}, "
            f"epochs: {epochs}; LoRA of rank {lora.rank} on {', '.join(targets)}"
            + (f"; going on after {whole[-1][1].name}" if whole else "")
        )
    try:
        trainer.train(resume_from_checkpoint=str(whole[-1][1]) if whole else None)
    finally:
        shown.close()
    return discover_checkpoints(out)


def draw_subset(n: int, fraction: float, seed: int) -> np.ndarray:
    """The rows that LESS warms up on: the first ``int(n * fraction)`` of numpy's permutation under ``seed``, int64.

    With ``fraction`` 1 these are all rows in their own order. Raises LessFastError where no row would be left.
    """
    if not 0 < fraction <= 1:
        raise LessFastError(f"warm-up fraction is {fraction}; expected more than 0 and at most 1")
    if fraction == 1 and n:
        return np.arange(n)
    rows = np.random.RandomState(seed).permutation(n)[: int(n * fraction)]
    if not len(rows):
        raise LessFastError(f"a warm-up fraction of {fraction} leaves none of {n} examples; raise the fraction")
    return rows


def _open_run(out: Path, settings: dict[str, Any], *, is_main: bool) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run with these settings; the settings are written where there is no checkpoint yet."""
    file = out / SETTINGS_NAME
    folders = checkpoint_folders(out)
    if folders and file.exists():
        found = json.loads(file.read_text())
        changes = [
            f"{name} {_short(found.get(name))} -> {_short(value)}"
            for name, value in settings.items()
            if found.get(name) != value
        ]
        if changes:
            raise LessFastError(
                f"{out}: holds a warm-up with other settings ({'; '.join(changes)}); "
                "choose another folder, or remove this one"
            )
    elif folders:
        raise LessFastError(f"{out}: holds checkpoints of another run; choose another folder for the warm-up")
    elif is_main:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as opened:
            opened.write((json.dumps(settings, indent=2) + "\n").encode())
    whole = [(step, path) for step, path in folders if read_state(path) is not None]
    if is_main:
        for _, path in set(folders) - set(whole):
            shutil.rmtree(path)
    return whole


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _digest(encoded: Sequence[Encoded]) -> str:
    text = json.dumps([(item.input_ids, item.labels) for item in encoded])
    return hashlib.sha256(text.encode()).hexdigest()


def _computes_in_bf16(on_gpu: bool) -> bool:
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def _pad_id(tokenizer: Any) -> int:
    """Any id will do where there is no padding token: padding is neither attended to nor in the loss."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


@dataclass(frozen=True)
class _Collator:
    pad_id: int

    def __call__(self, batch: list[Encoded]) -> dict[str, Any]:
        return collate(batch, self.pad_id)


@dataclass
class _Progress(TrainerCallback):
    """A bar over the optimizer steps, and the tokenizer beside every checkpoint, so that each folder stands alone."""

    tokenizer: Any
    show: bool
    bar: Any = field(default=None, init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        shown = self.show and state.is_world_process_zero
        self.bar = progress_bar(state.max_steps, unit="step", desc="warm-up", show=shown, initial=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.bar.set_postfix(loss=f"{kwargs['logs']['loss']:.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.tokenizer.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def close(self) -> None:
        """Take the bar away, whatever ended the training."""
        if self.bar is not None:
            self.bar.close()
