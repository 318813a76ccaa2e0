"""``less-fast run`` and ``less-fast warmup``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from less_fast.cli.output import named_files, only_results_on_stdout, require_local, show
from less_fast.config import RunConfig, Setting, settings

_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Progress = Annotated[bool, typer.Option(help="Show progress bars.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    # Every setting of RunConfig is a flag; the signature that typer reads is made from the settings themselves.
    hints = get_type_hints(_run, include_extras=True)
    own = [
        p.replace(annotation=hints[p.name]) for p in inspect.signature(_run).parameters.values() if p.name != "flags"
    ]
    flags = [
        inspect.Parameter(s.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(s)) for s in settings()
    ]
    _run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    _run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *flags)}
    app.command("run")(_run)
    app.command("warmup")(_warmup)


def _flag(setting: Setting) -> Any:
    default = getattr(RunConfig(), setting.name)
    flag = "--target" if setting.name == "targets" else f"--{setting.name.replace('_', '-')}"
    options = (setting.type, *get_args(setting.type))
    basic: Any = next((kind for kind in (bool, float, int) if kind in options), str)
    meaning = setting.meaning
    if setting.name == "targets":
        meaning = "NAME=FILE, or a file whose stem is then the name: examples that say what to select for. Repeatable."
    elif setting.is_list:
        basic = float if "float" in str(setting.type) else str
        meaning += " Repeatable."
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    if choices and basic is not str:
        basic = str  # a number, or one of the words; RunConfig tells them apart
    kind: Any = list[basic] | None if setting.is_list else basic | None
    declared = (flag, f"--no-{flag[2:]}") if basic is bool else (flag,)
    return Annotated[
        kind,
        typer.Option(
            "/".join(declared),
            help=meaning if default in (None, "", (), {}) else f"{meaning} (default: {str(default).lower()})",
            show_default=False,
            rich_help_panel=setting.section,
            metavar="|".join(choices) if len(choices) > 1 else None,
        ),
    ]


def _run(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML or TOML file of settings; flags win over it.", show_default=False)
    ] = None,
    write_config: Annotated[
        Path | None, typer.Option(help="Write all settings to this YAML or TOML file and stop.", show_default=False)
    ] = None,
    progress: _Progress = True,
    as_json: _Json = False,
    **flags: Any,
) -> None:
    """Do the whole of LESS: warm-up, features, scores, and a selection for each target.

    Each part is made once and kept in the folder --out; the same command goes on where an earlier one stopped.
    """
    from less_fast.config import read_settings

    given = {name: value for name, value in flags.items() if value is not None and value != []}
    if "targets" in given:
        given["targets"] = named_files(given["targets"])
    if "lora_modules" in given and given["lora_modules"] == ["auto"]:
        given["lora_modules"] = "auto"
    where = str(config) if config else "the command line"
    settings_given = {**(read_settings(config) if config else {}), **given}
    chosen = RunConfig.from_dict(settings_given, where)
    if write_config:
        chosen.save(write_config)
        print(f"{write_config}: all settings written; 'less-fast run {write_config}' runs them")
        return
    chosen.require_complete()
    with only_results_on_stdout():
        from less_fast.pipeline import run

        result = run(chosen, progress=progress)
    selected = [str(result.out / "selected" / f"{task}.jsonl") for task in result.selected]
    show(
        {"out": str(result.out), "selected": selected, "made": result.made, **result.report},
        "\n".join([result.table, "", "selected:", *(f"  {file}" for file in selected)]),
        as_json,
    )


def _warmup(
    model: Annotated[str, typer.Argument(help="Folder (or hub name) of the causal language model.")],
    data: Annotated[list[str], typer.Argument(help="Files of the pool.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoints.")],
    fraction: Annotated[float, typer.Option(help="Share of the pool to train on.")] = RunConfig.warmup_fraction,
    epochs: Annotated[int, typer.Option(help="Epochs; each ends with a checkpoint.")] = RunConfig.warmup_epochs,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = RunConfig.warmup_learning_rate,
    batch_size: Annotated[int, typer.Option(help="Examples per optimizer step.")] = RunConfig.warmup_batch_size,
    micro_batch_size: Annotated[
        int, typer.Option(help="Examples that a device computes at once.")
    ] = RunConfig.warmup_micro_batch_size,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA adapter.")] = RunConfig.lora_rank,
    lora_alpha: Annotated[int, typer.Option(help="Alpha of the LoRA adapter.")] = RunConfig.lora_alpha,
    lora_dropout: Annotated[float, typer.Option(help="Dropout of the LoRA adapter.")] = RunConfig.lora_dropout,
    lora_module: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a layer that gets an adapter. Repeatable.", show_default="the attention projections"
        ),
    ] = None,
    template: Annotated[str, typer.Option(help="How an example becomes text.", metavar="tulu|chat|raw")] = "tulu",
    max_length: Annotated[int, typer.Option(help="Tokens that an example is cut to.")] = RunConfig.max_length,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = RunConfig.warmup_seed,
    subset_seed: Annotated[
        int, typer.Option(help="Seed that the examples are drawn with.")
    ] = RunConfig.warmup_subset_seed,
    dtype: Annotated[str, typer.Option(help="Type of the model's frozen weights.")] = RunConfig.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = RunConfig.device,
    progress: _Progress = True,
    as_json: _Json = False,
) -> None:
    """Train a LoRA adapter on a random part of the pool and keep a checkpoint with optimizer state per epoch."""
    require_local(out, "OUT")
    with only_results_on_stdout():
        from less_fast.data import load_examples
        from less_fast.model.lora import LoraSettings
        from less_fast.report import checkpoint_table
        from less_fast.warmup import warmup

        checkpoints = warmup(
            model,
            load_examples(data),
            out,
            fraction=fraction,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            lora=LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_module or "auto"),
            template=template,
            max_length=max_length,
            seed=seed,
            subset_seed=subset_seed,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    total = sum(checkpoint.learning_rate for checkpoint in checkpoints) or 1.0
    weights = [checkpoint.learning_rate / total for checkpoint in checkpoints]
    result = [
        {"path": str(c.path), "step": c.step, "epoch": c.epoch, "learning_rate": c.learning_rate, "weight": weight}
        for c, weight in zip(checkpoints, weights)
    ]
    show({"checkpoints": result}, checkpoint_table(checkpoints, weights), as_json)
