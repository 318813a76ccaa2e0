"""``extract_many`` with a model that FSDP2 shards over the processes of torchrun, and with a whole one, to compare.

torchrun … -m support.sharded_extraction FOLDER WORK…, with tests/ in PYTHONPATH. FOLDER has the model and the pool of
``support.tiny``; each WORK is a function of that name below, which makes stores of its name there. Those before
``killed`` are left out after a restart.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from less_fast import LessFastError, Output, Projection, extract_many
from less_fast.model import load_model
from less_fast.model.devices import sharded_bytes
from support.large_models import adam_state
from support.models import adapted

LAYERS = "base_model.model.model.layers"
# The pass of one of two ranks in which it is killed: there are shards before it.
LATE = 7


def whole(folder: Path, device: str = "cpu") -> tuple[nn.Module, Any]:
    """A model and its tokenizer; equal in every process."""
    model, tokenizer = load_model(folder / "model", device=device)
    return adapted(model).to(device), tokenizer


def sharded(folder: Path, shape: tuple[int, ...] = (2,), device: str = "cpu", **settings: Any) -> tuple[nn.Module, Any]:
    """Each layer sharded over the last dimension of a mesh, and what is left with the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, tokenizer = whole(folder, device)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
    for layer in model.get_submodule(LAYERS).children():
        fully_shard(layer, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model, tokenizer


def make(
    folder: Path,
    name: str,
    model: nn.Module,
    tokenizer: Any,
    pool: str = "pool.jsonl",
    turned: bool = False,
    **settings: Any,
) -> None:
    """Stores ``name`` (Adam, float32) and ``name``-sgd (int8) of the pool, in shards of 8; ``turned``: that first."""
    outputs: dict[str | Path, Output] = {
        folder / name: Output(Projection("srht", 128, seed=1), adam_state(whole(folder)[0])),
        folder / f"{name}-sgd": Output(Projection("sjlt", 64)),
    }
    options = {"token_budget": 150, "shard_size": 8, "max_length": 64, "progress": False, **settings}
    if turned:
        outputs = dict(reversed(outputs.items()))
    extract_many(model, folder / pool, outputs, tokenizer=tokenizer, **options)


def on_pass(model: nn.Module, layer: int, act: Callable[[Tensor], None]) -> None:
    """Have ``act`` called with what a layer puts out, in passes that lead to features."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            act(output if isinstance(output, Tensor) else output[0])

    model.get_submodule(f"{LAYERS}.{layer}").register_forward_hook(hook)


def limited(model: nn.Module, backward: bool, failures: list[bool], limit: int = 90) -> None:
    """Have passes of more than ``limit`` tokens end without memory midway, in their forward or backward part.

    Shards have batches of about 88, 128 and 128 tokens: with 90, rank 1 fails in a round that rank 0 goes through, and
    rank 0 in the next; with 80 both fail in the first one.
    """

    def fail(*_: object) -> None:
        failures.append(backward)
        raise torch.OutOfMemoryError("out of memory: there is as much as the test wants")

    def act(output: Tensor) -> None:
        if output.shape[:2].numel() > limit:
            if backward:
                output.register_hook(fail)
            else:
                fail()

    on_pass(model, 0 if backward else 1, act)


def in_step(folder: Path) -> None:
    """Each rank writes down the shape of what its passes put out."""
    model, tokenizer = sharded(folder)
    shapes: list[tuple[int, ...]] = []
    on_pass(model, 1, lambda output: shapes.append(tuple(output.shape[:2])))
    make(folder, "in_step", model, tokenizer)
    (folder / f"passes-{os.environ['RANK']}").write_text(json.dumps(shapes))


def replicas(folder: Path) -> None:
    """Two groups share the stores; each has half of the ranks."""
    make(folder, "replicas", *sharded(folder, (2, int(os.environ["WORLD_SIZE"]) // 2)))


def one_device(folder: Path) -> None:
    """A mesh of one CUDA device; beside it what the whole model gives on that device."""
    make(folder, "one_device", *sharded(folder, (1,), "cuda"))
    make(folder, "one_device-whole", *whole(folder, "cuda"))


def sizes(folder: Path) -> None:
    """Each rank writes down what it holds of a model of which five modules are sharded."""
    from torch.distributed.fsdp import fully_shard

    model, _ = whole(folder)
    for layer in model.get_submodule(LAYERS).children():
        fully_shard(layer.get_submodule("self_attn"))
        fully_shard(layer.get_submodule("mlp"))
    fully_shard(model)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 2, dtype=torch.int64))  # leaves the outermost module's weights gathered
    (folder / f"bytes-{os.environ['RANK']}").write_text(str(sharded_bytes(model)))


def memory(folder: Path) -> None:
    for backward in (False, True):
        for checkpointed in (False, True):
            failures: list[bool] = []
            model, tokenizer = sharded(folder)
            flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
            limited(model, backward, failures, 80 if checkpointed else 90)
            name = f"memory-{backward:d}{checkpointed:d}"
            make(folder, name, model, tokenizer, checkpoint_activations=checkpointed)
            assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
            (folder / f"{name}-failures-{os.environ['RANK']}").write_text(str(len(failures)))


def refused(folder: Path) -> None:
    """Each rank writes down why: of arguments that differ, another store, and models that are spread otherwise."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import Shard, distribute_tensor

    rank = int(os.environ["RANK"])
    split, tokenizer = whole(folder)
    weight = split.get_submodule(LAYERS + ".0.mlp.up_proj").weight
    tensor = distribute_tensor(weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    split.get_submodule(LAYERS + ".0.mlp.up_proj").weight = nn.Parameter(tensor)
    (folder / "rank-0.jsonl").write_bytes((folder / "pool.jsonl").read_bytes())  # rank 1 has none
    mixed, _ = sharded(folder, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    attempts: list[tuple[nn.Module, dict[str, Any]]] = [
        (sharded(folder)[0], {"max_length": 64 - rank}),
        (sharded(folder)[0], {"checkpoint_activations": rank == 1}),
        (sharded(folder)[0], {"token_budget": 150 if rank else "auto"}),
        (sharded(folder)[0], {"turned": rank == 1}),
        (sharded(folder)[0], {"pool": f"rank-{rank}.jsonl"}),
        (sharded(folder)[0], {"max_length": 32}),
        (sharded(folder)[0], {"shard_range": (9, 3)}),
        (split, {}),
        (mixed, {}),
    ]
    messages = []
    for model, settings in attempts:
        try:
            make(folder, "in_step", model, tokenizer, **settings)
        except LessFastError as error:
            messages.append(str(error))
    (folder / f"refused-{rank}").write_text("\n".join(messages))


def killed(folder: Path) -> None:
    """Rank 1 is killed in a late pass, when torchrun starts it for the first time; then it counts them."""
    model, tokenizer = sharded(folder)
    passes = []

    def act(output: Tensor) -> None:
        passes.append(len(output))
        if len(passes) == LATE and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    on_pass(model, 1, act)
    make(folder, "killed", model, tokenizer)
    (folder / f"resumed-{os.environ['RANK']}").write_text(str(len(passes)))


def failing(folder: Path) -> None:
    """A batch of rank 1 finds no memory in the middle of a pass, with a torch that can't reset the model."""
    from torch.distributed.fsdp import FSDPModule

    del FSDPModule.reset_iter_state
    model, tokenizer = sharded(folder)
    limited(model, False, [])
    make(folder, "failing", model, tokenizer)


def main(folder: Path, *names: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    for name in names[names.index("killed") :] if restarted else names:
        globals()[name](folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
