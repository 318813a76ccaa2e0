"""``ShardActor``: holds a model, and makes the shards that it is told of."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import traceback
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from less_fast.errors import LessFastError
from less_fast.extract_job import ExtractJob
from less_fast.store.manifest import ShardEntry

logger = logging.getLogger("less_fast")

# The row of a task without shards: what it is to make is checked all the same.
NO_SHARD = -1
# Times that a task is tried whose files could not be written or read, and seconds before the second time.
_ATTEMPTS = 4
_PAUSE = 1.0
# Failures that the next attempt meets as well.
_LASTING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
}


class ShardActor:
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
        shards = [int(shard) for shard in batch["shard"] if shard != NO_SHARD]
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
