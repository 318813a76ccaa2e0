"""What the benchmarks share: models, batches, and the JSON rows."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from less_fast.data import CPU_BATCH_COST, collate, encode_all, load_examples, plan_batches
from less_fast.demo.corpus import generate
from less_fast.model.load import load_tokenizer


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to FILE as JSON lines")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each variant")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: all cores")
    return parser


def data_folder() -> Path | None:
    """The folder of real test data, from LESS_FAST_DATA."""
    value = os.environ.get("LESS_FAST_DATA")
    return Path(value) if value else None


def synchronize() -> None:
    """Wait for the CUDA device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, by linear interpolation."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def row(
    op: str, implementation: str, seconds: Sequence[float], *, device: torch.device | None = None, **facts: Any
) -> dict[str, Any]:
    """One JSON row: times in ms at the 50, 20 and 80 % quantiles, and where and when they were taken.

    ``device``: where they were taken; None for the CUDA device where there is one, else the CPU.
    """
    return {
        "op": op,
        "implementation": implementation,
        "ms_50": 1e3 * statistics.median(seconds),
        "ms_20": 1e3 * quantile(seconds, 0.2),
        "ms_80": 1e3 * quantile(seconds, 0.8),
        **facts,
        "peak_bytes": peak_bytes(device),
        **machine(device),
    }


def on_cuda(device: torch.device | None) -> bool:
    """Whether ``device`` is a CUDA device; None stands for the CUDA device where there is one."""
    return torch.cuda.is_available() if device is None else device.type == "cuda"


def peak_bytes(device: torch.device | None = None) -> int:
    """Most bytes held so far: of a CUDA device since its peak was last reset, else of this process."""
    if on_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device | None = None) -> str:
    """The CUDA device's name, or the CPU's with the number of threads in use."""
    if on_cuda(device):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    cuda = on_cuda(device)
    return {
        "device": device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "transformers", "less_fast")},
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _output(*command: str) -> str | None:
    """First line of what a command prints; None where it fails or is not there."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.strip().partition("\n")[0] or None


def write_rows(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Print the rows as a short table; append them to `path` as JSON lines."""
    for entry in rows:
        extra = "  ".join(f"{name}={_short(entry[name])}" for name in entry if name in _SHOWN)
        print(f"{entry['op']:<18} {entry['implementation']:<28} {entry['ms_50']:10.1f} ms  {extra}")
    append_rows(rows, path)


def append_rows(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Append the rows to `path` as JSON lines, where there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in rows)
        print(f"{len(rows)} rows added to {path}", file=sys.stderr)


_SHOWN = ("shape", "ratio_to_baseline", "ratio_to_floor", "examples_per_s", "tokens_per_s")


def _short(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def llama(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    *,
    tied: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A Llama with random weights, made where it is to run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device or torch.device("cpu")):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def with_adapter(model: nn.Module, rank: int) -> nn.Module:
    """LoRA on q, k, v and o with random, non-zero B, in the model's dtype as LESS has it; in eval mode."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def random_adam_state(model: nn.Module) -> Any:
    """An AdamState of plausible random moments for every LoRA weight, on the CPU as one read from a checkpoint."""
    from less_fast.optim import AdamState
    from less_fast.optim.checkpoint import Moments

    generators: dict[torch.device, torch.Generator] = {}
    moments = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            # Generated where it is used: a hundred million normals take seconds on a CPU.
            if p.device not in generators:
                generators[p.device] = torch.Generator(p.device).manual_seed(2)
            generator = generators[p.device]
            m = torch.randn(p.shape, generator=generator, device=p.device) * 1e-4
            v = torch.rand(p.shape, generator=generator, device=p.device) * 1e-8 + 1e-12
            moments[name] = Moments(m.cpu(), v.cpu(), 100)
    return AdamState(moments)


def example_batches(
    n: int, token_budget: int, max_length: int, vocabulary: int | None = None
) -> tuple[list[dict[str, Tensor]], str]:
    """N examples as length-sorted batches, and what they are: real ones from LESS_FAST_DATA, else the demo's corpus.

    `vocabulary`: token ids are taken modulo this, for models whose vocabulary is smaller than the tokenizer's.
    """
    folder = data_folder()
    if folder is not None:
        tokenizer = load_tokenizer(folder / "models/tiny-llama-2.4m")
        examples, source = load_examples(folder / "pool_2k.jsonl.gz").take(range(n)), "pool_2k"
        encoded = encode_all([examples[i] for i in range(n)], tokenizer, "tulu", max_length)
        pad = tokenizer.pad_token_id
    else:
        from less_fast.data import Encoded

        texts = [m["messages"][0]["content"] + m["messages"][1]["content"] for m in generate(n, seed=0)[:n]]
        ids = [list(text.encode()) for text in texts]
        encoded = [Encoded(i[:max_length], [-100] * 8 + i[8:max_length], False) for i in ids]
        source, pad = "demo corpus, bytes", 0
    batches = []
    for batch in plan_batches([len(e.input_ids) for e in encoded], token_budget, batch_cost=CPU_BATCH_COST):
        tensors = collate([encoded[i] for i in batch], pad)
        if vocabulary is not None:
            tensors["input_ids"] %= vocabulary
            tensors["labels"] = torch.where(tensors["labels"] < 0, -100, tensors["labels"] % vocabulary)
        batches.append(tensors)
    return batches, source
