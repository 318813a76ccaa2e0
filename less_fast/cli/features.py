"""``less-fast extract``, ``less-fast convert`` and ``less-fast info``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from less_fast.cli.output import only_results_on_stdout, show
from less_fast.config import RunConfig
from less_fast.errors import LessFastError

if TYPE_CHECKING:
    from less_fast.store import FeatureStore

_ENGINES = ("process", "ray")
_PRECONDITIONS = ("adam", "sgd", "sign")
_STORE_DTYPES = "float32|float16|bfloat16|int8|1bit"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("extract")(_extract)
    app.command("convert")(_convert)
    app.command("info")(_info)


def _extract(
    model: Annotated[str, typer.Argument(help="Folder (or hub name) of the model, or of an adapter.")],
    data: Annotated[list[str], typer.Argument(help="Files (or URLs) of examples.")],
    out: Annotated[
        str, typer.Argument(help="Folder (or URL) of the store; of all stores, where several are asked for.")
    ],
    adapter: Annotated[str | None, typer.Option(help="Folder of a LoRA adapter to put on the model.")] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="Checkpoint (or file) with Adam's state.", show_default="the adapter's folder"),
    ] = None,
    rule: Annotated[str, typer.Option(help="Adam's update.", metavar="less|torch")] = "less",
    precondition: Annotated[
        list[str] | None,
        typer.Option(
            help="What the gradient goes through. Repeatable.",
            metavar="adam|sgd|sign",
            show_default="adam with --optimizer, else sgd",
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Kind of projection.", metavar="srht|sjlt|rademacher|gaussian|identity")
    ] = RunConfig.projection,
    dim: Annotated[
        list[int] | None, typer.Option(help="Features per example. Repeatable.", show_default=str(RunConfig.dim))
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the projection.")] = RunConfig.seed,
    block: Annotated[int, typer.Option(help="Length of the runs that srht mixes.")] = RunConfig.block,
    nnz: Annotated[int, typer.Option(help="Non-zeros per column of sjlt.")] = RunConfig.nnz,
    modules: Annotated[
        str | None,
        typer.Option(help="Regular expression of the Linear layers to use.", show_default="the LoRA matrices"),
    ] = None,
    template: Annotated[
        str, typer.Option(help="How an example becomes text.", metavar="tulu|chat|raw")
    ] = RunConfig.template,
    max_length: Annotated[int, typer.Option(help="Tokens that an example is cut to.")] = RunConfig.max_length,
    limit: Annotated[int | None, typer.Option(help="Take only the first so many examples.")] = None,
    store_dtype: Annotated[
        str, typer.Option(help="Type that features are stored in.", metavar=_STORE_DTYPES)
    ] = RunConfig.store_dtype,
    token_budget: Annotated[str, typer.Option(help="Tokens per batch, padding included, or auto.")] = "auto",
    shard_size: Annotated[int, typer.Option(help="Examples per shard.")] = RunConfig.shard_size,
    dtype: Annotated[
        str, typer.Option(help="Type of the model's and the adapter's weights.", metavar="float32|bfloat16|float16")
    ] = RunConfig.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = RunConfig.device,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread the model's layers over all devices, the host and the disk.",
            metavar="auto|balanced|balanced_low_0|sequential",
        ),
    ] = RunConfig.device_map,
    quantization: Annotated[
        str | None, typer.Option(help="Bits of the base model's linear layers, by bitsandbytes.", metavar="4bit|8bit")
    ] = RunConfig.quantization,
    checkpoint_activations: Annotated[
        bool,
        typer.Option("--checkpoint-activations", help="Keep the layers' inputs alone and compute the rest twice."),
    ] = RunConfig.checkpoint_activations,
    backend: Annotated[
        str, typer.Option(help="What computes the projection.", metavar="auto|triton|cuda|cpu|reference")
    ] = RunConfig.backend,
    packing: Annotated[
        str, typer.Option(help="Whether batches are computed without padding.", metavar="auto|always|never")
    ] = RunConfig.packing,
    compile_model: Annotated[
        bool, typer.Option("--compile-model", help="Run torch.compile on the parts of the model without adapters.")
    ] = RunConfig.compile_model,
    shared: Annotated[
        bool | None,
        typer.Option(
            "--shared/--no-shared",
            help="Share the work with other processes that run the same command.",
            show_default="under torchrun",
        ),
    ] = None,
    shard_range: Annotated[
        str | None, typer.Option(help="Make only shards A to B - 1, and leave the rest to others.", metavar="A:B")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What runs it: this process, or Ray Data's actors.", metavar="process|ray")
    ] = "process",
    actors: Annotated[
        str | None,
        typer.Option(
            help="Actors that Ray runs, or the fewest and the most.",
            metavar="N|MIN:MAX",
            show_default="one for each GPU; without GPUs, for each machine",
        ),
    ] = None,
    gpus_per_actor: Annotated[float | None, typer.Option(help="GPUs of each actor.", show_default="1 if any")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="The Ray cluster to run on.", show_default="RAY_ADDRESS, or this machine alone")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the gradient features of examples to a store; the same command goes on where an earlier one stopped.

    Several --dim or --precondition are made in one pass, each in its own store, such as OUT/adam-dim8192.
    """
    preconditions = list(dict.fromkeys(precondition or (["adam"] if optimizer else ["sgd"])))
    dims = list(dict.fromkeys(dim or [RunConfig.dim]))
    for name in preconditions:
        if name not in _PRECONDITIONS:
            raise LessFastError(f"--precondition is {name!r}; expected one of {', '.join(_PRECONDITIONS)}")
    if token_budget != "auto" and not token_budget.isdigit():
        raise LessFastError(f"--token-budget is {token_budget!r}; expected auto or a number of tokens")
    window = re.fullmatch(r"(\d+):(\d+)", shard_range) if shard_range is not None else None
    if shard_range is not None and window is None:
        raise LessFastError(f"--shard-range is {shard_range!r}; expected two numbers such as 0:100")
    ray_options = {"--actors": actors, "--gpus-per-actor": gpus_per_actor, "--ray-address": ray_address}
    if engine not in _ENGINES:
        raise LessFastError(f"--engine is {engine!r}; expected one of {', '.join(_ENGINES)}")
    if engine != "ray" and (given := [name for name, value in ray_options.items() if value is not None]):
        raise LessFastError(f"{given[0]} is for --engine ray; leave it out")
    if engine == "ray" and shared is False:
        raise LessFastError("--no-shared does not go with --engine ray, whose actors share the store")
    with only_results_on_stdout():
        from less_fast.extract_job import ExtractJob
        from less_fast.projection import Projection

        job = ExtractJob(
            model,
            tuple(data),
            out,
            adapter,
            optimizer,
            rule,
            tuple(preconditions),
            tuple(Projection(kind, size, seed, block, nnz) for size in dims),
            limit,
            shard_size,
            dtype,
            device,
            device_map,
            quantization,
            {
                "template": template,
                "max_length": max_length,
                "dtype": store_dtype,
                "token_budget": token_budget if token_budget == "auto" else int(token_budget),
                "targets": modules,
                "backend": backend,
                "packing": packing,
                "compile_model": compile_model,
                "checkpoint_activations": checkpoint_activations,
            },
        )
        part = (int(window[1]), int(window[2])) if window else None
        if engine == "ray":
            from less_fast.on_ray import extract_on_ray

            stores = extract_on_ray(
                job,
                actors=_pool(actors),
                gpus_per_actor=gpus_per_actor,
                address=ray_address,
                shard_range=part,
                progress=progress,
            )
        else:
            stores = job.run(shared=shared, shard_range=part, progress=progress)
    results = [_summary(store) for store in stores.values()]
    show({"stores": results}, "\n".join(_line(result) for result in results), as_json)


def _pool(actors: str | None) -> int | tuple[int, int] | None:
    if actors is None:
        return None
    found = re.fullmatch(r"(\d+)(?::(\d+))?", actors)
    if found is None:
        raise LessFastError(f"--actors is {actors!r}; expected a number, or two such as 1:8")
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])


def _convert(
    store: Annotated[str, typer.Argument(help="Folder (or URL) of the store to convert; it stays as it is.")],
    out: Annotated[str, typer.Argument(help="Folder of the new store.")],
    dtype: Annotated[str, typer.Option(help="Type that features are stored in.", metavar=_STORE_DTYPES)],
    shard_size: Annotated[
        int | None, typer.Option(help="Examples per shard.", show_default="that of the store")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare every file of the store with its checksum.")] = True,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the features of a store in another type; the same command goes on where an earlier one stopped."""
    from less_fast.store import FeatureStore, convert_store

    converted = convert_store(store, out, dtype=dtype, shard_size=shard_size, verify=verify, progress=progress)
    result, before = _summary(converted), _facts(FeatureStore(store))["bytes"]
    ratio = f", {result['bytes'] / before:.1%} of the bytes of {store}" if before else ""
    show(result, _line(result) + ratio, as_json)


def _info(
    store: Annotated[str, typer.Argument(help="Folder (or URL) of a store.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its checksum.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Tell what a store holds and how it was made; with --verify, exit with status 1 if a file is damaged."""
    from less_fast.store import FeatureStore

    opened = FeatureStore(store, allow_partial=True)
    verification = opened.verify() if verify else None
    problems = verification.problems if verification else []
    # The columns of a damaged store cannot be read; what is wrong with it is then all there is to tell.
    result = _facts(opened) if problems else _summary(opened)
    text = "\n".join(f"{name}: {_plain(value)}" for name, value in result.items())
    if verification:
        result["verified"] = {"ok": not problems, "problems": problems}
        verdict = problems or [f"verified: all files of {verification.n_shards} shards are as they were written"]
        text = "\n".join([text, *verdict])
    show(result, text, as_json)
    if problems:
        raise typer.Exit(1)


def _facts(store: FeatureStore) -> dict[str, Any]:
    facts = store.facts
    total = -(-len(store) // store.manifest["shard_size"])
    result: dict[str, Any] = {
        "path": str(store.path),
        "rows": len(store),
        "dim": store.dim,
        "dtype": store.dtype,
        "shards": {"done": len(store.manifest["shards"]), "total": total},
        "bytes": sum(shard["bytes"] for shard in store.manifest["shards"]),
    }
    told = (
        "projection",
        "precondition",
        "converted_from",
        "template",
        "max_length",
        "model",
        "adapter",
        "examples",
        "numerics",
        "versions",
    )
    return {**result, **{name: facts[name] for name in told if name in facts}}


def _summary(store: FeatureStore) -> dict[str, Any]:
    from less_fast.store import Status

    counts = {status.name.lower(): int((store.status == status).sum()) for status in Status}
    norms = store.norms[store.status == Status.OK]
    return {
        **_facts(store),
        "status": {name: count for name, count in counts.items() if count or name == "ok"},
        "tokens": int(store.n_tokens.sum()),
        "labels": int(store.n_labels.sum()),
        "norm": {"smallest": float(norms.min()), "mean": float(norms.mean()), "largest": float(norms.max())}
        if len(norms)
        else None,
    }


def _line(result: dict[str, Any]) -> str:
    status = ", ".join(f"{count:,} {name}" for name, count in result["status"].items())
    kind = f", {result['precondition']['kind']}" if "precondition" in result else ""
    return f"{result['path']}: {result['rows']:,} rows x {result['dim']} in {result['dtype']}{kind} ({status})"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
