"""What do features cost while a model trains? The Trainer's ``train()`` with the callback against without it.

Both variants start from the same weights and run in turn, so that what else the machine does falls on both; they must
end with the same weights. With the callback counts everything that it does: the forward and backward pass of the
features, Adam's tables at every step, the rows on the disk and the finished store.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import arguments, data_folder, example_batches, llama, row, synchronize, with_adapter, write_rows
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from less_fast.compat.trainer import GradientFeaturesCallback
from less_fast.data import Encoded, collate
from less_fast.projection import Projection

_VARIANTS = ("train", "train + features")


class Case:
    """A model, its data, and one training of either variant at a time."""

    def __init__(self, model: nn.Module, dataset: list[Encoded], batch_size: int, projection: Projection) -> None:
        self.model, self.dataset, self.batch_size, self.projection = model, dataset, batch_size, projection
        self.start = {name: value.clone() for name, value in model.state_dict().items()}
        self.n_gradients = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)

    def train(self, variant: str) -> tuple[float, dict[str, Tensor]]:
        """Seconds of ``train()``, and the adapter's weights after it."""
        self.model.load_state_dict(self.start)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=self.model,
                args=TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=self.batch_size,
                    num_train_epochs=1,
                    learning_rate=1e-3,
                    use_cpu=not torch.cuda.is_available(),
                    report_to=[],
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                    dataloader_pin_memory=torch.cuda.is_available(),
                ),
                train_dataset=self.dataset,
                data_collator=lambda features: collate(features, 0),
            )
            trainer.remove_callback(PrinterCallback)
            if variant != "train":
                GradientFeaturesCallback(Path(folder) / "features", self.projection).attach(trainer)
            torch.manual_seed(0)
            synchronize()
            started = time.perf_counter()
            trainer.train()
            synchronize()
            seconds = time.perf_counter() - started
        return seconds, {name: p.detach().clone() for name, p in self.model.named_parameters() if "lora_" in name}


def measure(case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each variant, after one training of each to warm up."""
    seconds: dict[str, list[float]] = {variant: [] for variant in _VARIANTS}
    for repeat in range(repeats + 1):
        ends = {}
        for variant in _VARIANTS if repeat % 2 else _VARIANTS[::-1]:
            taken, ends[variant] = case.train(variant)
            if repeat:
                seconds[variant].append(taken)
        plain, watched = (ends[variant] for variant in _VARIANTS)
        if any(not torch.equal(plain[name], watched[name]) for name in plain):
            raise SystemExit("the callback changed the training; not timing different work")
    return seconds


def rows_of(name: str, case: Case, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per variant; the ratio is the median of the repeats' own."""
    ratio = statistics.median(b / a for a, b in zip(*(seconds[variant] for variant in _VARIANTS)))
    tokens = sum(len(example.input_ids) for example in case.dataset)
    facts: dict[str, Any] = {
        "shape": name,
        "dtype": "float32",
        "examples": len(case.dataset),
        "batch_size": case.batch_size,
        "tokens": tokens,
        "p": case.n_gradients,
        "k": case.projection.dim,
    }
    return [
        row(
            "callback",
            variant,
            seconds[variant],
            **facts,
            ratio_to_baseline=1.0 if variant == "train" else ratio,
            examples_per_s=len(case.dataset) / statistics.median(seconds[variant]),
            tokens_per_s=tokens / statistics.median(seconds[variant]),
        )
        for variant in _VARIANTS
    ]


def examples(n: int, max_length: int) -> tuple[list[Encoded], str]:
    """N tokenised examples, and what they are."""
    batches, source = example_batches(n, 4096, max_length, 4096)
    found = []
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
            length = int(mask.sum())
            found.append(Encoded(ids[:length].tolist(), labels[:length].tolist(), False))
    return found, source


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the rows."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--examples", type=int, default=256, help="training examples; one epoch")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per step")
    parser.add_argument("--tiny", action="store_true", help="a smaller model and 16 examples: measures nothing")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = data_folder()
    if options.tiny:
        name, model, rank = "tiny", llama(32, 2, 4, 2, 64, 4096), 4
    elif folder is not None:
        from less_fast.model import load_model

        name, model, rank = "tiny-2.4m r=8", load_model(folder / "models/tiny-llama-2.4m", device="cpu")[0], 8
    else:
        name, model, rank = "tiny-2.4m r=8", llama(192, 4, 6, 3, 512, 4096), 8
    dataset, source = examples(16 if options.tiny else options.examples, 1024)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(dataset)} examples of {source}")
    projection = Projection("srht", 256 if options.tiny else 8192)
    case = Case(with_adapter(model, rank), dataset, options.batch_size, projection)
    write_rows(rows_of(name, case, measure(case, options.repeats)), options.json)


if __name__ == "__main__":
    main()
