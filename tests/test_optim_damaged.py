"""Optimizer files that are damaged or made to harm: one line says what is wrong, no memory is taken on their word."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils._python_dispatch import TorchDispatchMode

from less_fast.checkpoints import discover_checkpoints
from less_fast.errors import LessFastError
from less_fast.optim.adam import AdamState
from less_fast.optim.inert import load_inert

DEEPSPEED = Path(__file__).parent / "fixtures" / "deepspeed"
Chunk = tuple[tuple[int, ...], Tensor]


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4, bias=False)


def entry(**changes: Any) -> dict[str, Any]:
    return {"step": 3, "exp_avg": torch.ones(4, 4), "exp_avg_sq": torch.ones(4, 4), **changes}


def write_file(folder: Path, content: Any) -> None:
    torch.save(content, folder / "optimizer.bin")


def write_distributed(folder: Path, tensors: dict[str, tuple[Sequence[int], list[Chunk]]]) -> None:
    """A distributed checkpoint by hand: key -> (shape, chunks); a chunk that comes twice is stored once."""
    known, places, stored = {}, {}, {}
    with (folder / "__0_0.distcp").open("wb") as stream:
        for key, (shape, chunks) in tensors.items():
            listed = [ChunkStorageMetadata(torch.Size(offsets), part.shape) for offsets, part in chunks]
            known[key] = TensorStorageMetadata(TensorProperties(), torch.Size(shape), listed)
            for offsets, part in chunks:
                if id(part) not in stored:
                    start = stream.tell()
                    torch.save(part, stream)
                    stored[id(part)] = _StorageInfo("__0_0.distcp", start, stream.tell() - start)
                places[MetadataIndex(key, torch.Size(offsets))] = stored[id(part)]
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(known, storage_data=places)))


def refusal(path: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(LessFastError) as error:
        AdamState.from_checkpoint(path, model or linear())
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000
    return str(error.value)


def test_a_huge_memo_index_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02Nr" + (2**22).to_bytes(4, "little") + b".")
    tracemalloc.start()
    try:
        assert "no metadata of a distributed checkpoint" in refusal(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"exp_avg": torch.full((1,), torch.nan).expand(2**20)},
        {"exp_avg_sq": torch.full((1,), torch.nan).expand(2**20)},
        {"state1": torch.zeros(4, 4).byte(), "state2": torch.zeros(1).byte().expand(2**20)},
    ],
)
def test_shapes_are_compared_before_anything_is_computed(changes: dict[str, Any], tmp_path: Path) -> None:
    """Were they computed with first, the error would be of the NaN, of unlike shapes or of the map that is missing."""
    write_file(tmp_path, {"state": {"weight": entry(**changes)}, "param_groups": []})
    assert "the moments of weight have shape (1048576,), the parameter (4, 4)" in refusal(tmp_path)


HALVES = [((0, 0), torch.ones(2, 4)), ((2, 0), torch.ones(2, 4))]
WHOLE = ((4, 4), [((0, 0), torch.ones(4, 4))])


@pytest.mark.parametrize(
    "second, reason",
    [
        (((10**7, 10**7), HALVES), "exp_avg_sq hold 16 of its 100000000000000 entries"),
        (((4, 4), [((0, 0), HALVES[0][1]), ((1, 0), HALVES[1][1])]), "exp_avg_sq overlap"),
        (((4, 4), [((0, 0), HALVES[0][1]), ((3, 0), HALVES[1][1])]), "a chunk of .*exp_avg_sq lies outside the tensor"),
        (((4, 4), [((0, 0), torch.ones(3, 4)), ((4, 0), torch.ones(1, 4))]), "lies outside the tensor"),
        (((4, 4), [((0, 0), torch.ones(1).expand(2, 4)), HALVES[1]]), "is no full tensor of shape"),
    ],
)
def test_chunks_must_cover_their_tensor_once(second: Any, reason: str, tmp_path: Path) -> None:
    keys = [f"optimizer.state.weight.{key}" for key in ("exp_avg", "exp_avg_sq")]
    write_distributed(tmp_path, {keys[0]: WHOLE, keys[1]: ((4, 4), HALVES)})
    moments = AdamState.from_checkpoint(tmp_path, linear()).moments["weight"]
    assert torch.equal(moments.v, torch.ones(4, 4))
    write_distributed(tmp_path, {keys[0]: WHOLE, keys[1]: second})
    with pytest.raises(LessFastError, match=reason):
        AdamState.from_checkpoint(tmp_path, linear())


def test_bytes_of_a_distributed_checkpoint_are_read_once(tmp_path: Path) -> None:
    part = torch.ones(4, 4)
    write_distributed(tmp_path, {f"optimizer.state.{n}.exp_avg": ((4, 4), [((0, 0), part)]) for n in range(100)})
    assert "names more bytes than its files have" in refusal(tmp_path)


def test_files_that_are_links_into_a_cache_are_read(tmp_path: Path) -> None:
    """As the hub's downloads lie: snapshots/<revision>/<file> is a link into blobs/."""
    model = linear()
    state = {"optimizer": {"state": {"weight": entry(step=torch.tensor(3.0))}}}
    written, snapshot, blobs = tmp_path / "written", tmp_path / "snapshots/1a2b", tmp_path / "blobs"
    save(state, storage_writer=FileSystemWriter(written), no_dist=True)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(written.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path(os.path.relpath(blobs / str(number), snapshot)))
    moments = AdamState.from_checkpoint(snapshot, model).moments["weight"]
    assert torch.equal(moments.m, torch.ones(4, 4)) and moments.step == 3


def doubled(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested, nested]
    return nested


@pytest.mark.parametrize("key", ["partition_count", "zero_stage"])
def test_errors_show_little_of_what_a_file_holds(key: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEEPSPEED / "zero1", tmp_path / "zero1"))
    for file in folder.rglob("*_optim_states.pt"):
        state = load_inert(file)["optimizer_state_dict"]
        kept = {name: state[name] for name in ("partition_count", "base_optimizer_state")}
        torch.save({"optimizer_state_dict": {"zero_stage": 1, **kept, key: doubled(14)}}, tmp_path / "new")
        (tmp_path / "new").replace(file)
    assert "[[..." in refusal(folder)


def test_errors_show_little_of_an_entrys_keys(tmp_path: Path) -> None:
    write_file(tmp_path, {"state": {"weight": {str(n) * 100: 0 for n in range(1000)}}})
    assert "expected Adam's exp_avg" in refusal(tmp_path)


def _broken_zip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:40] + b"\xff" * 400 + content[440:])


def _write(content: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(content, file)


@pytest.mark.parametrize(
    "damage",
    [
        _broken_zip,
        _write({"state": {0: entry()}, "param_groups": [3]}),
        _write({"state": {0: entry()}, "param_groups": [{"params": 7}]}),
        _write({"state": {"weight": entry(step="three")}, "param_groups": []}),
        _write({"state": {"weight": entry(step=float("inf"))}, "param_groups": []}),
        _write({"state": {"weight": entry()}, "param_groups": [{"betas": [None, None]}]}),
        _write({"state": {"weight": entry(exp_avg=torch.ones(4, 4).to_sparse())}, "param_groups": []}),
    ],
)
def test_damaged_files_are_one_line(damage: Callable[[Path], None], tmp_path: Path) -> None:
    write_file(tmp_path, {"state": {"weight": entry()}, "param_groups": []})
    damage(tmp_path / "optimizer.bin")
    assert "not a readable optimizer file" in refusal(tmp_path)


@pytest.mark.parametrize("name", [".metadata", "optimizer.bin"])
def test_whatever_byte_is_wrong_is_an_error_of_this_package_or_none(name: str, tmp_path: Path) -> None:
    if name == ".metadata":
        save({"state": {"weight": entry()}}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    else:
        write_file(tmp_path, {"state": {"weight": entry()}, "param_groups": []})
    content, chance, n_refused = (tmp_path / name).read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(len(content))] = chance.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        try:
            AdamState.from_checkpoint(tmp_path, linear())
        except LessFastError as error:
            assert "\n" not in str(error)
            n_refused += 1
    assert n_refused > 10


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    write_file(tmp_path, {"state": {"weight": entry()}, "param_groups": []})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    assert "adapter_model.safetensors: not a readable safetensors file" in refusal(tmp_path)


class _Count(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_blocks_are_dequantised_together(tmp_path: Path) -> None:
    """The operations are as many for 300 blocks as for 30."""
    counts = []
    for rows in (30, 300):
        parts = {"state": torch.zeros(rows, 256).byte(), "qmap": torch.ones(256), "absmax": torch.ones(rows)}
        saved = {f"{key}{n}": value for n in (1, 2) for key, value in parts.items()}
        write_file(tmp_path, {"state": {"weight": {"step": 1, **saved}}, "param_groups": []})
        with _Count() as count:
            AdamState.from_checkpoint(tmp_path, nn.Linear(256, rows, bias=False))
        counts.append(count.n)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"null", "missing or cut off, or no Trainer state"),
        (b'{"epoch": 1.0, "log_history": [], "caf\xe9": 1}', "missing or cut off, or no Trainer state"),
        (b'{"epoch": null, "log_history": []}', "missing or cut off, or no Trainer state"),
        (b'{"epoch": 1.0, "log_history": [{"learning_rate": null, "step": 1}]}', "learning_rate None at step 1"),
        (b'{"epoch": 1.0, "log_history": [{"learning_rate": NaN, "step": 1}]}', "learning_rate nan at step 1"),
        (b'{"epoch": 1.0, "log_history": [{"learning_rate": 0.1}]}', "learning_rate 0.1 at step None"),
    ],
)
def test_damaged_trainer_states_are_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/trainer_state.json").write_bytes(content)
    with pytest.raises(LessFastError, match=reason):
        discover_checkpoints(tmp_path)


def test_trainer_states_are_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    text = '{"epoch": 1.0, "log_history": [{"learning_rate": 0.1, "step": 2}], "best": "café"}'
    (tmp_path / "checkpoint-2/trainer_state.json").write_bytes(text.encode())
    asked, read_text = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: asked.append(kwargs) or read_text(*args, **kwargs))
    (found,) = discover_checkpoints(tmp_path)
    assert found.learning_rate == 0.1 and asked == [{"encoding": "utf-8"}]
