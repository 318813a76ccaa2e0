"""What do features cost on top of the model? Extraction against the bare forward and backward of the same batches.

The bare pass is defined in bare.py. Both variants run batch by batch in turn, so that what else the machine does falls
on both.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from bare import bare
from common import (
    arguments,
    data_folder,
    example_batches,
    llama,
    random_adam_state,
    row,
    synchronize,
    with_adapter,
    write_rows,
)
from torch import Tensor, nn

from less_fast.features import FeatureExtractor
from less_fast.projection import Projection


def measure(name: str, model: nn.Module, batches: list[dict[str, Tensor]], repeats: int) -> list[dict[str, Any]]:
    """Rows for one model: bare, and extraction with Adam and srht to 8192."""
    extractor = FeatureExtractor(model, Projection("srht", 8192), random_adam_state(model))
    check(model, extractor, batches[0])
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    examples = sum(len(b["input_ids"]) for b in batches)
    # Of every batch: what other work on the machine adds to one of them is left out by the batch's own median.
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in ("bare", "less_fast")}
    for repeat in range(repeats + 1):
        for number, batch in enumerate(batches):
            order = ["bare", "less_fast"] if (repeat + number) % 2 else ["less_fast", "bare"]
            for variant in order:
                synchronize()
                started = time.perf_counter()
                if variant == "bare":
                    bare(model, batch)
                else:
                    extractor(batch)
                synchronize()
                if repeat:
                    seconds[variant][number].append(time.perf_counter() - started)
    typical = {variant: sum(map(statistics.median, times)) for variant, times in seconds.items()}
    ratio = typical["less_fast"] / typical["bare"]
    facts: dict[str, Any] = {
        "shape": name,
        "dtype": "float32",
        "examples": examples,
        "tokens": tokens,
        "p": extractor.layout.size,
        "k": 8192,
    }
    return [
        row(
            "overhead",
            variant,
            [sum(times) for times in zip(*seconds[variant])],
            **facts,
            ratio_to_baseline=ratio if variant == "less_fast" else 1.0,
            examples_per_s=examples / typical[variant],
            tokens_per_s=tokens / typical[variant],
        )
        for variant in seconds
    ]


def check(model: nn.Module, extractor: FeatureExtractor, batch: dict[str, Tensor]) -> None:
    """Both variants must see the same losses, and the features must be those of the reference backend."""
    losses = extractor._engine(batch).losses
    if not torch.equal(bare(model, batch), losses):
        raise SystemExit("the bare pass and the extraction see different losses; not timing different work")
    reference = FeatureExtractor(model, Projection("srht", 8192), random_adam_state(model), backend="reference")
    expected = reference(batch)
    error = ((extractor(batch) - expected).norm() / expected.norm()).item()
    if not error < 1e-5:
        raise SystemExit(f"features differ from the reference by {error:.1e}; not timing a wrong result")


def main() -> None:
    """Measure both models and write the rows."""
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--examples", type=int, default=256, help="examples for the tiny model; an eighth for the other"
    )
    parser.add_argument("--token-budget", type=int, default=4096, help="padded tokens per batch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    folder = data_folder()
    if folder is not None:
        from less_fast.model import load_model

        tiny, _ = load_model(folder / "models/tiny-llama-2.4m", device="cpu")
    else:
        tiny = llama(192, 4, 6, 3, 512, 4096)
    medium = llama(512, 8, 8, 4, 1376, 8192)
    for name, model, rank, share in (("tiny-2.4m r=8", tiny, 8, 1), ("llama-26m r=16", medium, 16, 8)):
        n_parameters = sum(p.numel() for p in model.parameters())
        batches, source = example_batches(options.examples // share, options.token_budget, 1024, 4096)
        print(f"{name}: {n_parameters:,} parameters, {source}, {len(batches)} batches")
        rows += measure(name, with_adapter(model, rank), batches, options.repeats)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
