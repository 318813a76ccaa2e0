"""LESS's folders of .pt files: what is in them, that an interrupted one is finished, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.stores import folder_hashes, make_rows, make_store

from less_fast.compat.less import files
from less_fast.compat.less.files import (
    is_whole,
    load_tensor,
    merge_parts,
    read_folder,
    read_sidecar,
    require_intact,
    write_folder,
    write_store,
)
from less_fast.errors import LessFastError
from less_fast.store import Rows, Status

FACTS = {"projection": {"kind": "srht", "dim": 24, "seed": 0, "block": 8}, "layout_hash": "a" * 64}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def features(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((n, dim)) * 10.0 ** generator.integers(-7, 4, (n, 1))).astype(np.float32)


def write(folder: Path, rows: np.ndarray, **options) -> None:
    """With the rows in blocks that fit no part."""
    blocks = (rows[start : start + 37] for start in range(0, len(rows), 37))
    known = options.pop("known", make_rows(len(rows)))
    write_folder(folder, blocks, facts=options.pop("facts", FACTS), rows=known, **options)


@pytest.mark.parametrize(("n", "every", "counts"), [(400, 160, [160, 320, 400]), (320, 160, [160, 320]), (3, 160, [3])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_holds_the_files_that_less_writes(tmp_path, n, every, counts, dtype):
    rows = features(n)
    write(tmp_path / "out", rows, dtype=str(dtype).removeprefix("torch."))
    ours = {"all_orig.pt", "all_unormalized.pt", "less_fast.json", "rows.parquet"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == ours | {f"grads-{count}.pt" for count in counts}
    exact = torch.from_numpy(rows).to(dtype)
    chunks = exact.split(every)
    for count, chunk in zip(counts, chunks):
        assert torch.equal(torch.load(tmp_path / "out" / f"grads-{count}.pt"), chunk)
    assert torch.equal(torch.load(tmp_path / "out/all_unormalized.pt"), exact)
    unit = torch.cat([torch.nn.functional.normalize(chunk, dim=1) for chunk in chunks])
    assert torch.equal(torch.load(tmp_path / "out/all_orig.pt"), unit)
    assert is_whole(tmp_path / "out")


def test_excluded_rows_are_zeros_and_the_sidecar_says_why(tmp_path):
    rows = features(200)
    status = np.zeros(200, np.uint8)
    status[[3, 170]] = Status.NO_LABELS, Status.NON_FINITE
    subtasks = ["even", "odd"] * 100
    store = make_store(tmp_path / "store", rows, status=status, subtasks=subtasks, layout=[{"name": "w"}])
    write_store(store, tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert (found == 0).all(1).nonzero().flatten().tolist() == [3, 170]
    assert found.isfinite().all()
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar.excluded == {3: "no labels", 170: "not finite"}
    assert sidecar.rows == store.rows
    assert sidecar.facts == {name: value for name, value in store.facts.items() if name != "layout"}
    assert read_sidecar(tmp_path / "out/all_orig.pt") == sidecar
    require_intact(tmp_path / "out")


def test_hidden_states_are_kept_normalised_only(tmp_path):
    write(tmp_path, features(170), prefix="reps")
    names = {path.name for path in tmp_path.glob("*.pt")}
    assert names == {"reps-160.pt", "reps-170.pt", "all_orig.pt"}


def test_interrupted_at_any_file_a_second_call_ends_with_the_same_bytes(tmp_path, monkeypatch):
    rows = features(500)
    write(tmp_path / "whole", rows)
    expected = folder_hashes(tmp_path / "whole")
    assert len(expected) == 8
    real = files.save_tensor
    for last in range(6):
        calls = iter(range(100))

        def killed(value, path, last=last, calls=calls):
            if next(calls) == last:
                path.with_name(path.name + ".tmp").write_bytes(b"half")
                raise KeyboardInterrupt
            real(value, path)

        out = tmp_path / f"killed-{last}"
        monkeypatch.setattr(files, "save_tensor", killed)
        with pytest.raises(KeyboardInterrupt):
            write(out, rows)
        assert not is_whole(out)
        with pytest.raises(LessFastError, match="not written to its end"):
            read_sidecar(out)
        monkeypatch.setattr(files, "save_tensor", real)
        write(out, rows)
        assert folder_hashes(out) == expected


def test_a_whole_folder_is_left_alone_and_one_with_a_file_missing_is_made_again(tmp_path, monkeypatch):
    rows = features(200)
    write(tmp_path, rows)
    expected = folder_hashes(tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write(tmp_path, rows)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    (tmp_path / "all_orig.pt").unlink()
    write(tmp_path, rows)
    assert folder_hashes(tmp_path) == expected


def test_folders_of_others_and_of_other_settings_are_refused(tmp_path):
    torch.save(torch.zeros(160, 24), tmp_path / "grads-160.pt")
    with pytest.raises(LessFastError, match=r"grads-160\.pt, which less_fast did not write"):
        write(tmp_path, features(200))
    assert {path.name for path in tmp_path.iterdir()} == {"grads-160.pt"}
    write(tmp_path / "ours", features(200))
    other = {**FACTS, "projection": {**FACTS["projection"], "seed": 7}}
    with pytest.raises(LessFastError, match=r"facts\.projection\.seed: 0 -> 7"):
        write(tmp_path / "ours", features(200), facts=other)
    with pytest.raises(LessFastError, match="no rows"):
        write(tmp_path / "empty", features(0))


def renamed(n: int) -> Rows:
    return Rows([f"other-{i}" for i in range(n)], ["set"] * n, [None] * n)


@pytest.mark.parametrize("finished", [True, False])
def test_other_rows_of_the_same_settings_are_refused(tmp_path, monkeypatch, finished):
    """Finished or interrupted, the folder keeps what it has and never holds rows of both."""
    real = files.merge_parts
    if not finished:
        monkeypatch.setattr(files, "merge_parts", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, features(200))
        monkeypatch.setattr(files, "merge_parts", real)
    else:
        write(tmp_path, features(200))
    before = folder_hashes(tmp_path)
    with pytest.raises(LessFastError, match="n_rows: 200 -> 170"):
        write(tmp_path, features(170))
    with pytest.raises(LessFastError, match="rows_hash: "):
        write(tmp_path, features(200, seed=1), known=renamed(200))
    assert folder_hashes(tmp_path) == before


def test_parts_that_were_not_written_now_do_not_come_into_the_tables(tmp_path):
    rows = features(200)
    write(tmp_path, rows)
    expected = folder_hashes(tmp_path)
    (tmp_path / "all_orig.pt").unlink()
    torch.save(torch.ones(37, 24), tmp_path / "grads-37.pt")
    torch.save(torch.ones(5, 24), tmp_path / "reps-5.pt")  # not of these rows
    write(tmp_path, rows)
    assert (tmp_path / "reps-5.pt").exists()
    (tmp_path / "reps-5.pt").unlink()
    assert folder_hashes(tmp_path) == expected


@pytest.mark.parametrize("n", [170, 230])
def test_fewer_or_more_rows_than_examples_are_refused(tmp_path, n):
    with pytest.raises(LessFastError, match=f"{n} rows of features for 200 examples"):
        write(tmp_path, features(n), known=make_rows(200))
    assert not is_whole(tmp_path)


def test_what_an_interrupted_call_left_counts_as_room(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store", features(320))
    write_store(store, tmp_path / "out")
    parts, table = (tmp_path / "out").glob("grads-*.pt"), tmp_path / "out/all_unormalized.pt"
    there = sum(path.stat().st_size for path in [*parts, table])
    content = json.loads((tmp_path / "out/less_fast.json").read_text())
    del content["files"]
    (tmp_path / "out/less_fast.json").write_text(json.dumps(content))
    (tmp_path / "out/all_orig.pt").unlink()
    monkeypatch.setattr("less_fast.store.files._free_bytes", lambda _: 4 * 320 * 24 * 4 - there)
    write_store(store, tmp_path / "out")
    assert is_whole(tmp_path / "out")
    with pytest.raises(LessFastError, match="needs 123 kB more"):
        write_store(store, tmp_path / "new")


def test_damage_is_found(tmp_path):
    write(tmp_path, features(200))
    data = bytearray((tmp_path / "all_orig.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "all_orig.pt").write_bytes(bytes(data))
    with pytest.raises(LessFastError, match=r"all_orig\.pt: missing or damaged"):
        require_intact(tmp_path)


def test_parts_that_less_wrote_are_merged_in_the_order_of_their_numbers(tmp_path):
    rows = torch.from_numpy(features(250))
    for count, part in ((90, rows[:90]), (160, rows[90:160]), (250, rows[160:])):
        torch.save(part, tmp_path / f"grads-{count}.pt")
    torch.save(rows[:5], tmp_path / "reps-5.pt")
    (tmp_path / "grads-notes.txt").write_text("")
    for normalised in (True, False):
        merge_parts(tmp_path, normalised=normalised)
    assert torch.equal(read_folder(tmp_path, normalised=False), rows)
    unit = torch.cat([torch.nn.functional.normalize(part, dim=1) for part in (rows[:90], rows[90:160], rows[160:])])
    assert torch.equal(read_folder(tmp_path), unit)
    torch.save(rows[:3, :5], tmp_path / "grads-253.pt")
    with pytest.raises(LessFastError, match="has 5 columns"):
        merge_parts(tmp_path, normalised=True)
    with pytest.raises(LessFastError, match="no reps-<count>"):
        (tmp_path / "reps-5.pt").unlink()
        merge_parts(tmp_path, "reps", normalised=True)
    assert not list(tmp_path.glob("*.tmp"))


def test_parts_of_two_kinds_with_the_same_numbers_are_kept_apart(tmp_path):
    kinds = {prefix: torch.from_numpy(features(200, seed=seed)) for seed, prefix in enumerate(("grads", "reps"))}
    for prefix, rows in kinds.items():
        for count, part in ((160, rows[:160]), (200, rows[160:])):
            torch.save(part, tmp_path / f"{prefix}-{count}.pt")
    for prefix, rows in kinds.items():
        assert merge_parts(tmp_path, prefix, normalised=False) == 200
        assert torch.equal(read_folder(tmp_path, normalised=False), rows)


def test_parts_in_bfloat16_are_merged_and_parts_of_two_dtypes_are_not(tmp_path):
    rows = torch.from_numpy(features(200)).bfloat16()
    torch.save(rows[:160], tmp_path / "grads-160.pt")
    torch.save(rows[160:], tmp_path / "grads-200.pt")
    merge_parts(tmp_path, normalised=False)
    assert torch.equal(read_folder(tmp_path, normalised=False), rows)
    torch.save(rows[160:].float(), tmp_path / "grads-200.pt")
    with pytest.raises(LessFastError, match=r"grads-200\.pt: is torch\.float32, but grads-160\.pt torch\.bfloat16"):
        merge_parts(tmp_path, normalised=False)


def test_tensors_are_mapped_and_every_format_of_torch_is_read(tmp_path):
    rows = torch.from_numpy(features(10))
    torch.save(rows, tmp_path / "all_orig.pt")
    mapped = read_folder(tmp_path)
    assert torch.equal(mapped, rows)
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / "all_orig.pt") in Path("/proc/self/maps").read_text()
    torch.save(rows, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_folder(tmp_path / "old.pt"), rows)
    torch.save(rows.tolist(), tmp_path / "list.pt")
    assert torch.equal(load_tensor(tmp_path / "list.pt"), rows)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"rubbish", "cannot be read"),
        ({"grads": torch.zeros(2, 2)}, "holds a dict"),
        (np.zeros((2, 2)), "something else than tensors"),
        (torch.zeros(3), "one row per example"),
    ],
)
def test_files_that_are_no_matrix_are_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "all_orig.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(LessFastError, match=rf"all_orig\.pt.*{reason}"):
        read_folder(tmp_path)


def test_missing_files_and_unreadable_sidecars_are_named(tmp_path):
    with pytest.raises(LessFastError, match=r"all_orig\.pt: no such file"):
        read_folder(tmp_path)
    assert read_sidecar(tmp_path) is None
    (tmp_path / "less_fast.json").write_text("{")
    with pytest.raises(LessFastError, match="not valid JSON"):
        read_sidecar(tmp_path)
    (tmp_path / "less_fast.json").write_text('{"schema_version": 9}')
    with pytest.raises(LessFastError, match="upgrade less_fast"):
        read_sidecar(tmp_path)


def test_a_finished_folder_that_lost_a_table_is_made_again(tmp_path):
    store = make_store(tmp_path / "store", np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32))
    write_store(store, tmp_path / "folder")
    before = (tmp_path / "folder" / "all_orig.pt").read_bytes()
    assert is_whole(tmp_path / "folder")
    (tmp_path / "folder" / "all_orig.pt").unlink()
    assert not is_whole(tmp_path / "folder")
    write_store(store, tmp_path / "folder")
    assert (tmp_path / "folder" / "all_orig.pt").read_bytes() == before


def test_a_table_that_is_cut_off_is_named(tmp_path):
    store = make_store(tmp_path / "store", np.random.default_rng(0).standard_normal((500, 64), dtype=np.float32))
    write_store(store, tmp_path / "folder")
    table = tmp_path / "folder" / "all_orig.pt"
    table.write_bytes(table.read_bytes()[:20000])
    with pytest.raises(LessFastError, match=r"all_orig\.pt: cannot be read"):
        read_folder(tmp_path / "folder")
