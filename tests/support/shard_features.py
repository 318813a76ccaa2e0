"""Features of a model that FSDP2 has sharded over two processes; rank 1 has fewer batches.

python -m support.shard_features FOLDER RANK for both ranks at once, with tests/ in PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from less_fast import FeatureExtractor, Projection
from support.large_models import adam_state
from support.models import adapted, batch, causal_lm

PROJECTION = Projection("srht", 256, seed=4)


def make_model() -> nn.Module:
    """Equal on both ranks, and in the process that compares."""
    return adapted(causal_lm(tie_word_embeddings=False))


def batches(rank: int) -> list[dict[str, Tensor]]:
    """Three of rank 0, one of them without labels; one of rank 1, filled up with empty ones."""
    lengths = [(17, 3, 9), (5, 8), (11,)] if rank == 0 else [(4, 20)]
    found = [batch(each, seed=10 * rank + number) for number, each in enumerate(lengths)]
    if rank == 0:
        found[1]["labels"][:] = -100
    empty = torch.zeros(0, 1, dtype=torch.int64)
    return found + [{"input_ids": empty, "labels": empty}] * (3 - len(found))


def work(rank: int, out: Path) -> None:
    """Shard the model, and save this rank's features, with and without checkpointed activations."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.set_num_threads(1)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    model = make_model()
    state = adam_state(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_submodule("base_model.model.model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    found = {}
    for on in (False, True):
        extractor = FeatureExtractor(model, PROJECTION, state, checkpoint_activations=on)
        found[on] = [extractor(data) for data in batches(rank)]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(isinstance(p, DTensor) for p in model.parameters())
    torch.save({"features": found, "layout": extractor.layout.to_list()}, out / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[2]), Path(sys.argv[1]))
