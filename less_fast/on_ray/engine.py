"""``extract_on_ray``: what the driver does."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from less_fast.errors import LessFastError
from less_fast.extract_job import ExtractJob
from less_fast.on_ray.pool import Pool
from less_fast.on_ray.session import quiet, session
from less_fast.on_ray.stores import Stores
from less_fast.progress import progress_bar
from less_fast.store import FeatureStore, Rows
from less_fast.workers import Worker

# Runs in a row that find all of their shards made already, which are not here.
_IDLE_RUNS = 3
# How long the actors take at most that leave a cluster on which others stay.
_LEAVE_SECONDS = 10.0


def extract_on_ray(
    job: ExtractJob,
    *,
    actors: int | tuple[int, int] | None = None,
    gpus_per_actor: float | None = None,
    address: str | None = None,
    shard_range: tuple[int, int] | None = None,
    progress: bool = True,
) -> dict[str, FeatureStore]:
    """Make the stores of a job on a pool of Ray actors; the bytes are those of :meth:`ExtractJob.run`.

    Parameters
    ----------
    job : its files have to be there, by the same names, on every machine of the cluster.
    actors : how many, or the fewest and the most, between which Ray Data follows the work and what the cluster has.
        Each holds a model. Default: one for each GPU that the cluster has now; without GPUs, one for each machine.
    gpus_per_actor : default 1 where the job's device is cuda, or auto and the cluster has GPUs; else 0.
    address : of a Ray cluster. Default: RAY_ADDRESS, else Ray is started on this machine, for this call. Where the
        process has called ``ray.init``, that is what is used.
    shard_range, progress : as for :func:`~less_fast.extract_many`.

    Raises
    ------
    LessFastError
        if Ray is not installed or not to be reached, where an actor dies again and again, and for all that an actor
        raises it for.
    """
    if Worker.from_environment().size > 1:
        raise LessFastError("the ray engine starts processes of its own; run it without torchrun")
    if job.device not in ("auto", "cpu", "cuda"):
        raise LessFastError(f"device is {job.device!r}, but Ray gives each actor its GPUs; expected auto, cpu or cuda")
    from less_fast.extraction import shard_window, tell_of_rows

    examples = job.examples()
    n_shards = -(-len(examples) // job.shard_size) if job.shard_size > 0 else 0
    shards = shard_window(shard_range, n_shards)
    with ExitStack() as stack:
        rows = Rows(examples.ids, examples.datasets, examples.subtasks)
        window = range(n_shards) if shards is None else shards
        stores = Stores(stack, list(job.stores), rows, job.shard_size, window)
        with session(address) as ours:
            pool = Pool.of(job, actors, gpus_per_actor, ours)
            stores.open_begun()
            with quiet():
                make_missing(pool.told(job), pool, stores, progress)
            if not ours:
                stores.outstay(_LEAVE_SECONDS)
        made = stores.close(allow_partial=shards is not None)
    tell_of_rows(next(iter(made.values())))
    return made


def make_missing(job: ExtractJob, pool: Pool, stores: Stores, progress: bool) -> None:
    """Run the pool till no shard is missing."""
    missing, n_idle = stores.missing(), 0
    total = stores.n_rows(stores.shards)
    with progress_bar(total, unit="ex", desc="features", show=progress, initial=total - stores.n_rows(missing)) as bar:
        while True:  # once at least, so that settings are checked although all is there
            n_made = pool.run(job, missing, stores, bar)
            missing = stores.missing()
            bar.update(total - stores.n_rows(missing) - bar.n)
            if not missing:
                return
            n_idle = 0 if n_made else n_idle + 1
            if n_idle == _IDLE_RUNS:
                raise LessFastError(
                    f"{len(missing)} shards (the first: {missing[0]}) are there where actors look for them, but not "
                    f"in {', '.join(job.stores)} on {socket.gethostname()}; name a folder that all machines share"
                )
            if not n_made:
                missing = stores.missing_unclaimed()
