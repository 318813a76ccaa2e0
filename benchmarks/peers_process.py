"""A worker's process as the driver sees it: started with a variant, asked for passes, and stopped."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

LIMIT_S = 600.0


class FailedError(Exception):
    """The worker gave a reason instead of an answer, or none."""


class Worker:
    """One process for one variant of a job file, so that its peak of memory is its own. Idle, it waits on its input.

    ``ready``: what it told on its start: version, torch, loaded_bytes, columns.

    Raises FailedError where it refuses, from :meth:`work` as well.
    """

    def __init__(self, python: Path, script: Path, job: Path, variant: str, log: Path, env: Mapping[str, str]) -> None:
        reading, writing = os.pipe()
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [python, script, job, variant, str(writing)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                pass_fds=(writing,),
                cwd=job.parent,
                env=env,
                text=True,
            )
        os.close(writing)
        self._answers = os.fdopen(reading)
        self._log = log
        try:
            self.ready = self._answer()
        except FailedError:
            self.stop()
            raise

    def work(self, features: Path | None = None) -> dict[str, Any]:
        """One pass, and its features to a file where one is named: seconds, peak_bytes."""
        assert self._process.stdin is not None
        try:
            print(features or "", file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise FailedError(self._ended()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        timer = Timer(LIMIT_S, self._process.kill)
        timer.start()
        line = self._answers.readline()
        timer.cancel()
        if not line:
            raise FailedError(self._ended())
        answer = json.loads(line)
        if "reason" in answer:
            raise FailedError(answer["reason"])
        return answer

    def _ended(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"the process ended with status {code}: {lines[-1] if lines else 'it printed nothing'}"

    def stop(self) -> None:
        """Close the pipes and wait for the process to end."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
