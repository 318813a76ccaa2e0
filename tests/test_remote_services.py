"""Stores in buckets of S3 and Google Cloud Storage, through their own clients, against servers that emulate them.

pip install s3fs 'moto[server]' gcsfs gcp-storage-emulator && pytest -m heavy tests/test_remote_services.py
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support import tiny
from support.stores import make_store, open_writer, refusal, write_pending

from less_fast.data import load_examples
from less_fast.paths import local_copy
from less_fast.scoring import influence
from less_fast.store import FeatureStore

pytestmark = pytest.mark.heavy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("s3fs", "moto.server"):
        pytest.importorskip(name, reason="s3fs and moto[server] are not installed")
    import boto3
    from moto.server import ThreadedMotoServer

    port = free_port()
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{port}")
    server = ThreadedMotoServer(port=port, verbose=False)
    server.start()
    boto3.client("s3").create_bucket(Bucket="bucket")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another test, at another port
    yield "s3://bucket"
    server.stop()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(name, reason="gcsfs and gcp-storage-emulator are not installed")
    from gcp_storage_emulator.server import create_server

    port = free_port()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
    server = create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    yield "gs://bucket"
    server.stop()


@pytest.mark.parametrize("service", ["s3", "gs"])
def test_a_store_in_a_bucket(service: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bucket: str = request.getfixturevalue(service)
    features = np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float32)
    local: Any = make_store(tmp_path / "s", features, dtype="int8", shard_size=512)
    url = f"{bucket}/folder/s"
    for n_shards in (3, 8):  # the second goes on with the first
        with open_writer(url, 4096, 1024, dtype="int8", shard_size=512) as writer:  # type: ignore[arg-type]
            assert writer.pending() == list(range(0 if n_shards == 3 else 3, 8))
            if n_shards == 8:
                write_pending(writer, features)
                continue
            for shard in range(n_shards):
                rows = np.arange(*writer.bounds(shard))
                facts = {"token_budget": 100 + shard}
                writer.write(shard, features[rows], np.zeros(512), rows + 2, rows + 1, facts)
    remote = FeatureStore(url, verify=True)
    for name in ("status", "norms", "n_tokens", "n_labels"):
        np.testing.assert_array_equal(getattr(remote, name), getattr(local, name))
    np.testing.assert_array_equal(remote[:], local[:])
    target = make_store(tmp_path / "target", features[:9])
    assert influence(url, target).matrix.tobytes() == influence(local, target).matrix.tobytes()
    with local_copy(url) as copied:
        whole = {file.relative_to(copied): file.read_bytes() for file in Path(copied).rglob("*") if file.is_file()}
    assert whole == {
        file.relative_to(local.path): file.read_bytes() for file in local.path.rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("service", ["s3", "gs"])
def test_examples_and_what_is_missing_in_a_bucket(service: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bucket: str = request.getfixturevalue(service)
    file = tiny.write_jsonl(tmp_path / "pool.jsonl", tiny.examples("sums", 30))
    fsspec.filesystem(service).pipe_file(f"{bucket}/pool.jsonl", file.read_bytes())
    examples = load_examples(f"{bucket}/pool.jsonl")
    assert examples.fingerprint == load_examples(file).fingerprint
    examples.write_lines([3, 1], f"{bucket}/chosen/best.jsonl")
    assert load_examples(f"{bucket}/chosen/best.jsonl").ids == ["sums_3", "sums_1"]
    assert "there is no such folder" in refusal(lambda: FeatureStore(f"{bucket}/none"))
    elsewhere = f"{service}://no-such-bucket/s"
    assert f"cannot write {elsewhere}" in refusal(lambda: open_writer(elsewhere, 4, 8))  # type: ignore[arg-type]
