"""``python -m less_fast.compat.less.get_info``: LESS's command for gradient features, hidden states and losses."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from less_fast.compat.less.command import run_command
from less_fast.errors import LessFastError


def parser() -> argparse.ArgumentParser:
    """LESS's flags and defaults, and a few of ours."""
    p = argparse.ArgumentParser(
        prog="python -m less_fast.compat.less.get_info",
        description="Write gradient features, hidden states or losses of examples in the files of LESS. "
        "The same command goes on where an interrupted one stopped.",
    )
    p.add_argument("--task", help="bbh, tydiqa or mmlu, or a .jsonl file of examples, which may have a subtask each")
    p.add_argument("--train_file", help="training examples, .jsonl; --task comes first where both are given")
    p.add_argument("--info_type", choices=["grads", "reps", "loss"], required=True)
    p.add_argument("--model_path", required=True, help="a model, or a checkpoint of an adapter")
    p.add_argument("--max_samples", type=int, help="take only the first so many examples")
    p.add_argument("--torch_dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of all weights")
    p.add_argument("--output_path", required=True, help="the folder that the files go to")
    p.add_argument("--data_dir", help="LESS's data folder, with eval/{bbh,tydiqa,mmlu} in it")
    p.add_argument("--gradient_projection_dimension", nargs="+", type=int, default=[8192], help="one or several dims")
    p.add_argument("--gradient_type", default="adam", choices=["adam", "sign", "sgd"])
    p.add_argument("--chat_format", default="tulu", help="of the three tasks: tulu; anything else for [INST]")
    p.add_argument("--use_chat_format", type=_flag, default=True, metavar="True|False", help="of the three tasks")
    p.add_argument("--max_length", type=int, default=2048, help="tokens that an example is cut to")
    p.add_argument("--zh", action="store_true", help="of tydiqa: the examples translated to Chinese")
    p.add_argument("--initialize_lora", action="store_true", help="put a new adapter on a model without one")
    p.add_argument("--lora_r", type=int, default=8)
    p.add_argument("--lora_alpha", type=float, default=32)
    p.add_argument("--lora_dropout", type=float, default=0.1, help="kept in the adapter; dropout is off here")
    p.add_argument("--lora_target_modules", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    ours = p.add_argument_group("not in LESS")
    ours.add_argument("--task_file", help="the examples of a task whose name --task gives")
    ours.add_argument("--projection", default="srht", choices=["srht", "rademacher"])
    ours.add_argument("--token_budget", type=_budget, default="auto", help="tokens per batch, or auto")
    ours.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    ours.add_argument("--optimizer_state", help="file or folder of Adam's state; default: beside the model")
    return p


def run(args: argparse.Namespace) -> None:
    """Do what the parsed flags ask for; raises LessFastError for whatever a user can get wrong."""
    if args.task is None and args.train_file is None and args.task_file is None:
        raise LessFastError("nothing to read: give --train_file, or --task (with --data_dir or --task_file)")
    from less_fast.compat.less import collect_grad_reps as collect
    from less_fast.compat.less.loading import load_less_model
    from less_fast.model.lora import LoraSettings
    from less_fast.optim import AdamState

    lora = None
    if args.initialize_lora:
        lora = LoraSettings(args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    model, tokenizer = load_less_model(args.model_path, dtype=args.torch_dtype, device=args.device, lora=lora)
    source = _source(args, tokenizer)
    what = args.task_file or args.task or args.train_file
    print(f"{what}: {len(source):,} examples, {args.info_type} to {args.output_path}", flush=True)
    if args.info_type == "reps":
        collect.write_reps(source, model, args.output_path, args.token_budget)
    elif args.info_type == "loss":
        collect.write_losses(source, model, args.output_path, args.token_budget)
    else:
        precondition: Any = args.gradient_type
        if precondition == "adam":
            precondition = AdamState.from_checkpoint(args.optimizer_state or args.model_path, model, rule="less")
        collect.write_gradients(
            source,
            model,
            args.output_path,
            args.gradient_projection_dimension,
            precondition,
            args.projection,
            args.token_budget,
        )
    print(f"finished: {args.output_path}", flush=True)


def _source(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The examples that the flags name, as tokens."""
    from less_fast.compat.less.get_validation_dataset import validation_tokens
    from less_fast.compat.less.tokens import from_encoded, from_examples
    from less_fast.data import load_examples
    from less_fast.store import Rows

    if args.max_samples is not None and args.max_samples < 1:
        raise LessFastError(f"--max_samples is {args.max_samples}; expected at least 1")
    if args.task is None and args.task_file is None:
        return from_examples(load_examples(args.train_file, limit=args.max_samples), tokenizer, args.max_length)
    rows, encoded = validation_tokens(
        args.task or "task",
        tokenizer=tokenizer,
        max_length=args.max_length,
        data_dir=args.data_dir,
        use_chat_format=args.use_chat_format,
        chat_format=args.chat_format,
        zh=args.zh,
        task_file=args.task_file,
    )
    n = args.max_samples
    return from_encoded(encoded[:n], Rows(rows.ids[:n], rows.datasets[:n], rows.subtasks[:n]))


def _flag(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _budget(text: str) -> int | str:
    return text if text == "auto" else int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    args = parser().parse_args(arguments)
    # Before transformers is imported: its bars and hints are about loading weights, not about the work.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.addLevelName(logging.WARNING, "warning")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module=r"less_fast\b")
    run(args)


if __name__ == "__main__":
    run_command(main)
