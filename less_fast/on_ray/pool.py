"""``Pool``: how many actors there are, what each has of the cluster, and Ray Data's run over them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

from tqdm import tqdm

from less_fast.errors import LessFastError
from less_fast.extract_job import ExtractJob
from less_fast.on_ray.actor import NO_SHARD, ShardActor
from less_fast.on_ray.stores import Stores

logger = logging.getLogger("less_fast")

# A task is a few shards, so that one is read, one computed and one written at a time; but every actor gets many tasks,
# so that none is left with a long one at the end.
_TASKS_PER_ACTOR = 16
_SHARDS_PER_TASK = 8
# Times that Ray starts an actor again; one that dies more often dies of more than bad luck, of too little memory say.
_RESTARTS = 6
# Letters of Ray's reasons, which go on and on.
_REASON = 340


@dataclass(frozen=True)
class Pool:
    """Between ``smallest`` and ``largest`` actors, each with so many CPUs and GPUs."""

    smallest: int
    largest: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, job: ExtractJob, actors: int | tuple[int, int] | None, gpus: float | None, alone: bool) -> Pool:
        """What is asked for, or fits the cluster; ``alone``: it is this machine, and nothing is added to it."""
        import ray

        # A cluster's head has none often, and gets no actor then.
        with_cpus = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        machines = with_cpus or [{"CPU": 1}]
        n_gpus = sum(machine.get("GPU", 0) for machine in machines)
        if gpus is None:
            gpus = 1 if job.device == "cuda" or (job.device == "auto" and n_gpus) else 0
        if gpus < 0 or (gpus > 1 and gpus % 1) or (not gpus and job.device == "cuda"):
            raise LessFastError(
                f"gpus_per_actor is {gpus:g} with device {job.device}; expected a part of one GPU or a whole number"
            )
        if gpus > n_gpus and alone:
            raise LessFastError(f"an actor is to have {gpus:g} GPUs, but Ray finds {n_gpus:g}; use --device cpu")
        if actors is None:
            actors = max(1, int(n_gpus / gpus) if gpus else len(machines))
        smallest, largest = (actors, actors) if isinstance(actors, int) else actors
        if not 1 <= smallest <= largest:
            raise LessFastError(f"actors are {smallest}:{largest}; expected ascending numbers from 1 on")
        fewest_cpus = min(machine["CPU"] for machine in machines)
        cpus = 1 if gpus else max(1, fewest_cpus // -(-largest // len(machines)))
        return cls(smallest, largest, cpus, gpus)

    def told(self, job: ExtractJob) -> ExtractJob:
        """The job as actors get it: without GPUs they are not to look for any."""
        return job if self.gpus or job.device_map is not None else replace(job, device="cpu")

    def run(self, job: ExtractJob, shards: Sequence[int], stores: Stores, bar: tqdm[Any]) -> int:
        """Have the actors make shards; the number of those that they did make."""
        import ray.data
        from ray.exceptions import RayError

        per_task = max(1, min(_SHARDS_PER_TASK, len(shards) // (self.largest * _TASKS_PER_ACTOR)))
        n_tasks = max(1, -(-len(shards) // per_task))
        rows = [{"shard": shard} for shard in shards] or [{"shard": NO_SHARD}]
        tasks = ray.data.from_items(rows, override_num_blocks=n_tasks)
        results = tasks.map_batches(
            ShardActor,
            fn_constructor_args=(job, os.getcwd()),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(self.smallest, n_tasks), max_size=min(self.largest, n_tasks)
            ),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=_RESTARTS,  # Ray Data's default is to do so for ever
        )
        results.context.enable_progress_bars = False
        results.context.print_on_execution_start = False
        n_made = 0
        try:
            found: Any = iter(results.iter_batches(batch_size=None, prefetch_batches=0))
            with closing(found) as batches:  # else the actors live on after an error
                for batch in batches:
                    for shard, text in zip(batch["shard"].tolist(), batch["result"].tolist()):
                        result = json.loads(text)
                        if "refusal" in result:
                            raise LessFastError(result["refusal"])
                        if "failure" in result:
                            raise RuntimeError(f"an actor failed:\n{result['failure']}")
                        stores.open()
                        stores.add(shard, result["entries"])
                        if any(result["entries"]):
                            n_made += 1
                            bar.update(stores.n_rows([shard]))
        except RayError as error:
            if n_made:
                logger.warning("an actor has died too often; all are started anew, since some shards were finished")
                return n_made
            last = shorten([line for line in str(error).splitlines() if line.strip()][-1], _REASON)
            raise LessFastError(f"Ray gave up ({last}); everything that was finished is kept") from error
        return n_made
