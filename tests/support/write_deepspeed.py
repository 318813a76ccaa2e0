"""Writes tests/fixtures/deepspeed with DeepSpeed itself: PYTHONPATH=tests python -m support.write_deepspeed FOLDER.

Needs ``pip install deepspeed==0.19.8`` and a C++ compiler, which is why the tests read what it wrote once. Two
processes train a small model for three steps in each of DeepSpeed's partitionings; beside each checkpoint lies
``expected.pt``, the moments as DeepSpeed's own ``safe_get_full_optimizer_state`` gives them. That of 0.19.8 mixes
parameters up where the gradients go round robin, so this variant has none: its moments are those of ``zero1``, which is
the same training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from support.small_training import STEPS, small_batch, small_model, small_optimizer

# Each variant has parameters whose sizes two processes do not divide, so that there are paddings.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero1_bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "zero2_round_robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "zero3_sub_groups": {"zero_optimization": {"stage": 3, "sub_group_size": 20}},
}


def _process(rank: int, variant: str, out: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state

    deepspeed.init_distributed("gloo", verbose=False)
    model = small_model()
    optimizer = small_optimizer(model)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    config.update(VARIANTS[variant])
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    dtype = next(engine.module.parameters()).dtype
    for step in range(STEPS):
        engine.backward(engine(small_batch(step, rank).to(dtype)).float().square().sum())
        engine.step()
    engine.save_checkpoint(str(out), tag="global_step3")
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed 0.19.8 links the states once, after the first group's first step, when the second has none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    expected = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                whole = safe_get_full_optimizer_state(parameter, key)
                whole = optimizer.state[parameter][key] if whole is None else whole  # without ZeRO
                expected[f"{name}.{key}"] = whole.clone().view(small_model().get_parameter(name).shape)
    if rank == 0 and not VARIANTS[variant]["zero_optimization"].get("round_robin_gradients"):
        torch.save(expected, out / "expected.pt")
    if rank == 0:
        for script in out.glob("*.py"):
            script.unlink()  # DeepSpeed puts its zero_to_fp32.py there
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Write all variants into the folder given."""
    for port, variant in enumerate(VARIANTS, start=29600):
        arguments = (variant, Path(sys.argv[1]) / variant, port)
        torch.multiprocessing.start_processes(_process, arguments, nprocs=2, start_method="spawn")


if __name__ == "__main__":
    main()
