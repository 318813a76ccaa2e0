"""What every worker process of the peers benchmark shares: the job, the examples, and the conversation on its pipes.

Runs in the environment of a peer, so nothing of less_fast is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LORA = "lora_"
IGNORED = -100


class RefusedError(Exception):
    """The peer cannot do this variant; the message is the reason."""


@dataclass(frozen=True)
class Job:
    """What is to be done: files and settings, equal for every worker. Lists of examples and batches hold their order.

    ``checkpoint``: a folder with a PEFT adapter and the Trainer's ``optimizer.pt``. ``batches``: example numbers.
    """

    folder: Path
    model: Path
    checkpoint: Path
    dim: int
    threads: int
    batches: list[list[int]]

    @classmethod
    def read(cls, file: Path) -> Job:
        """The job that the driver wrote."""
        facts = json.loads(file.read_text())
        return cls(file.parent, Path(facts["model"]), Path(facts["checkpoint"]), *map(facts.get, _PLAIN))

    @cached_property
    def examples(self) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of every example."""
        with np.load(self.folder / "examples.npz") as file:
            cuts = file["offsets"][1:-1]
            ids, labels = ([row.tolist() for row in np.split(file[name], cuts)] for name in ("ids", "labels"))
        return list(zip(ids, labels))

    @property
    def optimizer_file(self) -> Path:
        """The Trainer's optimizer state."""
        return self.checkpoint / "optimizer.pt"

    @property
    def order(self) -> list[int]:
        """The example of every row where batches are worked on one after the other."""
        return [example for batch in self.batches for example in batch]

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Examples as one batch padded on the right: input_ids, attention_mask and labels, int64 (N, T)."""
        length = max(len(self.examples[n][0]) for n in numbers)

        def padded(rows: Sequence[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

        ids, labels = zip(*(self.examples[n] for n in numbers))
        mask = padded([[1] * len(row) for row in ids], 0)
        return {"input_ids": padded(ids, 0), "attention_mask": mask, "labels": padded(labels, IGNORED)}


_PLAIN = ("dim", "threads", "batches")


@dataclass(frozen=True)
class Runner:
    """One variant, ready: ``work`` is timed; ``features`` makes (N, K) in the order of the examples of its result.

    ``columns``: where features are entries of the gradient themselves, which ones.
    """

    work: Callable[[], Any]
    features: Callable[[Any], Tensor]
    columns: Tensor | None = None


def in_example_order(job: Job, rows: Sequence[Tensor]) -> Tensor:
    """Features of all batches, (N, K), from those of each batch."""
    joined = torch.cat(list(rows))
    out = torch.empty_like(joined)
    out[torch.tensor(job.order)] = joined
    return out


def trainable_model(job: Job) -> tuple[Any, dict[str, nn.Parameter]]:
    """The model with its adapter in float32 and eval mode, and the LoRA weights, which alone require gradients."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job.checkpoint, autocast_adapter_dtype=False).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(LORA in name)
    return model, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sum_of_means(logits: Tensor, labels: Tensor) -> Tensor:
    """The examples' own mean losses, summed: its gradient at an example's outputs is that of the example alone."""
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    ).view(len(labels), -1)
    return (losses.sum(1) / (labels[:, 1:] != IGNORED).sum(1)).sum()


def memory(which: str) -> int:
    """Bytes of this process: VmHWM the most so far, VmRSS now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {which}")


def serve(package: str | None, start: Callable[[Job, str], Runner]) -> None:
    """Answer the driver: ``worker.py JOB_FILE VARIANT PIPE``, then one pass for every line of standard input.

    Answers are JSON lines to the open file of number PIPE, as peers print what they like to standard output. A line
    that is not empty names the file for the features.
    """
    answers = os.fdopen(int(sys.argv[3]), "w", buffering=1)

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=answers)

    try:
        job, variant = Job.read(Path(sys.argv[1])), sys.argv[2]
        torch.set_num_threads(job.threads)
        runner = start(job, variant)
        columns = None if runner.columns is None else runner.columns.tolist()
        installed = version(package) if package else None
        answer(version=installed, torch=torch.__version__, loaded_bytes=memory("VmRSS"), columns=columns)
        for line in sys.stdin:
            started = time.perf_counter()
            result = runner.work()
            seconds = time.perf_counter() - started
            peak = memory("VmHWM")
            if line.strip():
                np.save(line.strip(), runner.features(result).detach().float().numpy())
            del result
            answer(seconds=seconds, peak_bytes=peak)
    except RefusedError as refusal:
        answer(reason=str(refusal))
    except Exception as error:
        # The driver tells a peer's own refusal, which the table of variants announces, from a fault.
        answer(reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
