"""Trains a small model with FSDP2 on two processes and saves its optimizer with accelerate's and torch's own writers.

python -m support.write_fsdp FOLDER RANK for both ranks at once, with tests/ in PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from support.small_training import STEPS, small_batch, small_model, small_optimizer


def write(rank: int, out: Path) -> None:
    """Everything that two processes can save of one training run, each in its own folder of ``out``."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.set_num_threads(1)
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import StateDictType, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    from accelerate import PartialState
    from accelerate.utils import save_fsdp_optimizer

    PartialState(cpu=True)  # accelerate's logger wants it
    model = small_model()
    mesh = init_device_mesh("cpu", (2,))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    optimizer = small_optimizer(model)
    for step in range(STEPS):
        model(small_batch(step, rank)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, use_dcp in (("SHARDED_STATE_DICT", True), ("SHARDED_STATE_DICT", False), ("FULL_STATE_DICT", True)):
        # What accelerate's FullyShardedDataParallelPlugin holds of it; accelerate itself starts FSDP on GPUs only.
        plugin: Any = SimpleNamespace(
            fsdp_version=2, state_dict_type=StateDictType[name], state_dict_config=None, optim_state_dict_config=None
        )
        folder = out / (name if use_dcp else "PER_PROCESS")
        save_fsdp_optimizer(plugin, SimpleNamespace(process_index=rank), optimizer, model, folder, use_dcp=use_dcp)
    # As torchtitan saves: one flat dictionary, a copy of the group's settings for every parameter.
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"model": model.state_dict(), "optimizer": flat}, checkpoint_id=out / "FLAT")
    # As scripts save that know nothing of names.
    dcp.save({"optim": optimizer.state_dict()}, checkpoint_id=out / "NUMBERED")
    dcp.save({"model": model.state_dict()}, checkpoint_id=out / "MODEL_ONLY")
    dcp.save({"a": {"optimizer": flat}, "b": {"optimizer": flat}}, checkpoint_id=out / "TWO")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    write(int(sys.argv[2]), Path(sys.argv[1]))
