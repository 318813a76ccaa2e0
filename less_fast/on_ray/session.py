"""Ray itself: reached or started, ended, and kept from telling what is no news."""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from less_fast.errors import LessFastError

_CONNECT_SECONDS = 10.0
# Rows are a few hundred bytes; Ray's default is a third of the memory.
_OBJECT_STORE_BYTES = 100 << 20
# Ray's own C++ parts report what is no news (every actor can be restarted), and usage is sent over the network.
_ENVIRONMENT = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def quiet() -> Iterator[None]:
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
def session(address: str | None) -> Iterator[bool]:
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
