"""``extract_on_ray``: the map over a store's shards, run by Ray Data on a pool of actors."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from tqdm import tqdm

from less_fast.errors import LessFastError
from less_fast.extract_job import ExtractJob
from less_fast.progress import progress_bar
from less_fast.store import FeatureStore, Rows, StoreWriter
from less_fast.store.manifest import ShardEntry
from less_fast.store.sharing import claim_shards, missing_shards
from less_fast.workers import Worker

logger = logging.getLogger("less_fast")

# A task is a few shards, so that one is read, one computed and one written at a time; but every actor gets many tasks,
# so that none is left with a long one at the end.
_TASKS_PER_ACTOR = 16
_SHARDS_PER_TASK = 8
# Times that a task is tried whose files could not be written or read, and seconds before the second time.
_ATTEMPTS = 4
_PAUSE = 1.0
# Failures that the next attempt meets as well.
_LASTING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
}
# Times that Ray starts an actor again; one that dies more often dies of more than bad luck, of too little memory say.
_RESTARTS = 6
# Letters of Ray's reasons, which go on and on.
_REASON = 340
# Runs in a row that find all of their shards made already, which are not here.
_IDLE_RUNS = 3
# How often finished shards are listed at most, and what part of the time goes into that at most.
_LIST_SECONDS = 1.0
_LIST_SHARE = 0.05
# How often a driver that has nothing left to do looks whether other processes have finished or died.
_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
# How long the actors take at most that leave a cluster on which others stay.
_LEAVE_SECONDS = 10.0
# Rows are a few hundred bytes; Ray's default is a third of the memory.
_OBJECT_STORE_BYTES = 100 << 20
# Ray's own C++ parts report what is no news (every actor can be restarted), and usage is sent over the network.
_ENVIRONMENT = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}
# The row of a task without shards: what it is to make is checked all the same.
_NO_SHARD = -1


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
        stores = _Stores(stack, list(job.stores), rows, job.shard_size, window)
        with _session(address) as ours:
            pool = _Pool.of(job, actors, gpus_per_actor, ours)
            stores.open_begun()
            with _quiet():
                _make(pool.told(job), pool, stores, progress)
            if not ours:
                stores.outstay(_LEAVE_SECONDS)
        made = stores.close(allow_partial=shards is not None)
    tell_of_rows(next(iter(made.values())))
    return made


def _make(job: ExtractJob, pool: _Pool, stores: _Stores, progress: bool) -> None:
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


class _Stores:
    """The stores as the driver sees them: it alone adds to their manifests while actors put shards in place.

    Nobody knows what they are made with till an actor has loaded it; the first one to do so creates them.
    """

    def __init__(self, stack: ExitStack, paths: list[str], rows: Rows, shard_size: int, shards: range) -> None:
        self._stack = stack
        self._paths = paths
        self._rows = rows
        self._shard_size = shard_size
        self.shards = shards
        self._writers: list[StoreWriter] = []
        self._unlisted: list[dict[int, ShardEntry]] = [{} for _ in paths]
        self._list_after = 0.0

    def open_begun(self) -> None:
        """Join the writers of the stores, where all of them have been created."""
        with suppress(LessFastError):  # an actor says what is wrong with what is there, if anything is
            self.open()

    def open(self) -> None:
        """Join the writers of the stores, which an actor has created."""
        if self._writers:
            return
        arguments = [self._arguments(path) for path in self._paths]
        self._writers = [
            self._stack.enter_context(StoreWriter(path, **made, shared=True))
            for path, made in zip(self._paths, arguments)
        ]

    def _arguments(self, path: str) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that shards are missing is known
            found = FeatureStore(path, allow_partial=True)
        sizes = {"dim": found.dim, "dtype": found.dtype, "shard_size": found.manifest["shard_size"]}
        return {"facts": found.facts, "rows": self._rows, **sizes}

    def add(self, shard: int, entries: Sequence[dict[str, Any] | None]) -> None:
        """Take notice of a shard that is in place: for every store its entry, None where somebody else has made it."""
        for unlisted, entry in zip(self._unlisted, entries):
            if entry is not None:
                unlisted[shard] = ShardEntry(**entry)
        if time.monotonic() >= self._list_after:
            self._list()

    def n_rows(self, shards: Iterable[int]) -> int:
        size = self._shard_size
        return sum(min(size, len(self._rows) - shard * size) for shard in shards)

    def _list(self) -> None:
        began = time.monotonic()
        for writer, unlisted in zip(self._writers, self._unlisted):
            # A network's file system may show a file late; a folder that is another one on each machine, never.
            path = writer.path
            seen = {n: e for n, e in unlisted.items() if not isinstance(path, Path) or (path / e.file).exists()}
            if seen:
                writer.enlist(seen)
            for shard in seen:
                del unlisted[shard]
        now = time.monotonic()
        self._list_after = now + max(_LIST_SECONDS, (now - began) / _LIST_SHARE)

    def missing(self) -> list[int]:
        """The shards that are not there; all of them before the stores are."""
        if not self._writers:
            return list(self.shards)
        self._list()
        return missing_shards(self._writers, self.shards)

    def missing_unclaimed(self) -> list[int]:
        """Wait till a shard that is missing is nobody's, or none is missing; return what is missing."""
        while missing := self.missing():
            for claim in claim_shards(self._writers, missing):
                for writer in claim.writers:
                    writer.give_up(claim.shard)
                return missing
            time.sleep(_POLL_SECONDS)
        return missing

    def outstay(self, seconds: float) -> None:
        """Wait for actors that are about to end: the last to leave a store cleans up behind all."""
        deadline = time.monotonic() + seconds
        for path, writer in zip(self._paths, self._writers):
            writer.release()
            arguments = self._arguments(path)
            while time.monotonic() < deadline:
                try:
                    StoreWriter(path, **arguments).release()
                    break
                except LessFastError:
                    time.sleep(_POLL_SECONDS / 5)

    def close(self, *, allow_partial: bool) -> dict[str, FeatureStore]:
        return {path: writer.close(allow_partial=allow_partial) for path, writer in zip(self._paths, self._writers)}


@dataclass(frozen=True)
class _Pool:
    """Between ``smallest`` and ``largest`` actors, each with so many CPUs and GPUs."""

    smallest: int
    largest: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, job: ExtractJob, actors: int | tuple[int, int] | None, gpus: float | None, alone: bool) -> _Pool:
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

    def run(self, job: ExtractJob, shards: Sequence[int], stores: _Stores, bar: tqdm[Any]) -> int:
        """Have the actors make shards; the number of those that they did make."""
        import ray.data
        from ray.exceptions import RayError

        per_task = max(1, min(_SHARDS_PER_TASK, len(shards) // (self.largest * _TASKS_PER_ACTOR)))
        n_tasks = max(1, -(-len(shards) // per_task))
        rows = [{"shard": shard} for shard in shards] or [{"shard": _NO_SHARD}]
        tasks = ray.data.from_items(rows, override_num_blocks=n_tasks)
        results = tasks.map_batches(
            _ShardActor,
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


class _ShardActor:
    """Holds a model, and makes the shards that it is told of.

    Errors are results, since the engine would take one for a reason to begin anew.
    """

    def __init__(self, job: ExtractJob, folder: str) -> None:
        self._open = ExitStack()
        self._error: dict[str, Any] | None = None
        with suppress(OSError):
            os.chdir(folder)  # paths may be relative to where the command was given
        try:
            extraction = job.prepare()
            self._job = extraction.job
            self._writers = extraction.open(self._open, shared=True)
        except Exception as error:
            self._error = _described(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shards = [int(shard) for shard in batch["shard"] if shard != _NO_SHARD]
        results: list[dict[str, Any]]
        if self._error is not None:
            results = [self._error] * len(batch["shard"])
        else:
            try:
                made = self._put(shards)
                results = [
                    {"entries": [asdict(found[shard]) if shard in found else None for found in made]}
                    for shard in batch["shard"].tolist()
                ]
            except Exception as error:
                results = [_described(error)] * len(batch["shard"])
        return {"shard": batch["shard"], "result": np.array([json.dumps(result) for result in results], object)}

    def _put(self, shards: list[int]) -> list[dict[int, ShardEntry]]:
        """What a failed attempt has finished is left alone by the next one, and listed by who looks next."""
        for attempt in range(_ATTEMPTS - 1):
            try:
                return self._job.put(self._writers, shards)
            except (LessFastError, OSError) as error:
                if not _may_pass(error):
                    raise
                logger.warning("shards %s: %s; the next attempt follows", shards, error)
                time.sleep(_PAUSE * 2**attempt)
        return self._job.put(self._writers, shards)

    def __del__(self) -> None:
        self._open.close()


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, LessFastError):
        return {"refusal": str(error)}
    return {"failure": "".join(traceback.format_exception(type(error), error, error.__traceback__))}


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error is, or comes from, one of a file system or a network that may be gone the next time."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno not in _LASTING
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block Ray Data says nothing but that the cluster is too small: the rest is told in our own words."""
    import ray.data  # noqa: F401  # it sets these levels itself when it is imported

    levels = {"ray.data": logging.CRITICAL, "ray.data._internal.execution.resource_manager": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            # Of max_restarts, which has no other place before Ray 2.64.
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _session(address: str | None) -> Iterator[bool]:
    """Within the block Ray is there; whether it was started for the block, on this machine, and ends with it."""
    try:
        import ray
    except ImportError:
        raise LessFastError("the ray engine needs Ray Data: pip install 'less_fast[ray]'") from None
    if ray.is_initialized():
        yield False
        return
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if place == "local":
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        if found := re.fullmatch(r"([^/:]+):(\d+)", place):  # Ray itself would try for many minutes
            socket.create_connection((found[1], int(found[2])), _CONNECT_SECONDS).close()
        ray.init(place, **options)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LessFastError(
            f"no Ray cluster at {place!r} ({reason}); is it running, and of the same version?"
        ) from error
    try:
        yield place == "local"
    finally:
        ray.shutdown()
