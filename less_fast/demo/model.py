"""The demo's tokenizer and model: a byte-level BPE and a small Llama, both trained on the spot on the demo's corpus."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from less_fast.progress import progress_bar

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def plain_text(example: Mapping[str, Any]) -> str:
    """The messages of an example as one text, for the tokenizer and the model to learn from.

    Roles are written as in the "tulu" template, so that they become a few tokens each.
    """
    return "\n".join(f"<|{message['role']}|>\n{message['content']}" for message in example["messages"])


def train_tokenizer(texts: Iterable[str], out: str | Path, *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` tokens, saved in ``out`` for ``AutoTokenizer``.

    It puts ``<s>`` before a text, as Llama's does; ``</s>`` and ``<pad>`` are known to it.
    """
    tokenizer = Tokenizer(models.BPE())
    # Digits apart: a number's tokens then do not depend on which numbers happened to be frequent.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    wrapped.save_pretrained(out)
    return wrapped


def train_model(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 300,
    hidden_size: int = 96,
    layers: int = 3,
    heads: int = 4,
    rows: int = 16,
    row_length: int = 128,
    learning_rate: float = 3e-3,
    progress: bool = True,
) -> dict[str, float]:
    """Train a small Llama as a language model on ``texts`` and save it, with the tokenizer, in ``out``.

    The texts are packed into rows of ``row_length`` tokens; a step reads ``rows`` of them. The number of steps is
    fixed, not the time, so the weights are a function of the arguments (and of the machine's arithmetic) alone.

    Returns the mean loss of the first and of the last tenth of the steps (nats per token), the number of tokens read,
    the number of parameters, and the seconds it took.
    """
    started = time.monotonic()
    packed = pack(texts, tokenizer, row_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer, hidden_size, layers, heads))
        losses = _train(model, packed, steps, rows, learning_rate, progress)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    tenth = max(1, steps // 10)
    return {
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "tokens": steps * rows * row_length,
        "parameters": model.num_parameters(),
        "seconds": time.monotonic() - started,
    }


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, row_length: int) -> Tensor:
    """All texts, each between ``<s>`` and ``</s>``, one after the other in rows: int64 (rows, row_length)."""
    stream = [token for ids in tokenizer(list(texts)).input_ids for token in (*ids, tokenizer.eos_token_id)]
    n_rows = len(stream) // row_length
    return torch.tensor(stream[: n_rows * row_length]).view(n_rows, row_length)


def _config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(
    model: LlamaForCausalLM, packed: Tensor, steps: int, rows: int, learning_rate: float, progress: bool
) -> list[float]:
    """AdamW with a one-cycle learning rate; the loss of every step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    with progress_bar(steps, unit="step", desc="training the demo model", show=progress) as bar:
        while len(losses) < steps:
            for batch in torch.randperm(len(packed)).split(rows)[: steps - len(losses)]:
                ids = packed[batch]
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
    return losses
