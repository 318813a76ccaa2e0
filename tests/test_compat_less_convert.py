"""Folders of LESS's and QLESS's to stores and back: bit for bit, checksummed, and nothing about them guessed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.stores import make_store

from less_fast import influence
from less_fast.compat.less import convert
from less_fast.compat.less.convert import open_source, to_less, to_qless, to_store
from less_fast.compat.less.matching import influence_scores
from less_fast.compat.less.qless import Quantiser, read_packed
from less_fast.errors import LessFastError
from less_fast.store import FeatureStore, Status

DIM = 32
N = 250


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def features(n: int = N, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((n, DIM)) * 10.0 ** generator.integers(-7, 4, (n, 1))).astype(np.float32)


def less_folder(folder: Path, rows: torch.Tensor, every: int = 160) -> Path:
    """As LESS leaves it: parts, all rows normalised part by part, all rows as they are."""
    folder.mkdir(parents=True)
    parts = rows.split(every)
    for number, part in enumerate(parts):
        torch.save(part.clone(), folder / f"grads-{min((number + 1) * every, len(rows))}.pt")
    torch.save(torch.cat([torch.nn.functional.normalize(part, dim=1) for part in parts]), folder / "all_orig.pt")
    torch.save(rows, folder / "all_unormalized.pt")
    return folder


def examples_file(path: Path, n: int = N) -> Path:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rows = ({"dataset": "d", "id": f"x{k}", "subtask": f"s{k % 3}", "messages": messages} for k in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(examples: Path) -> list[str]:
    """The flags that say what a folder of LESS's does not."""
    return [
        *("--projection", "fast_jl", "--seed", "0", "--multiprocessors", "132"),
        *("--precondition", "adam", "--examples", str(examples)),
    ]


def run(*arguments: object) -> None:
    convert.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_less_to_store_to_less_is_bit_exact(tmp_path, dtype, capsys):
    rows = torch.from_numpy(features()).to(dtype)
    rows[rows == 0] = 1  # raw gradients that float16 lost
    rows[7] = float("nan")
    less_folder(tmp_path / "less", rows)
    run("to-store", tmp_path / "less", tmp_path / "store", *told(examples_file(tmp_path / "e.jsonl")))
    assert "250 rows of 32" in capsys.readouterr().out
    store = FeatureStore(tmp_path / "store")
    usable = [row for row in range(N) if row != 7]
    assert torch.equal(torch.from_numpy(store[usable]), rows[usable].float())
    assert store.status.tolist() == [Status.NON_FINITE if row == 7 else Status.OK for row in range(N)]
    assert store.rows.ids == [f"x{k}" for k in range(N)] and store.rows.subtasks[:4] == ["s0", "s1", "s2", "s0"]
    assert store.verify().ok
    assert store.projection.to_dict() == {"kind": "rademacher", "dim": DIM, "seed": 0}
    assert store.facts["projector"] == "fast_jl, 132 multiprocessors"
    assert store.facts["precondition"] == {"kind": "adam", "rule": "less"}
    assert store.facts["converted_from"]["file"] == "all_unormalized.pt"
    run("to-less", tmp_path / "store", tmp_path / "again", "--dtype", str(dtype).removeprefix("torch."))
    for name in ("grads-160.pt", "grads-250.pt", "all_orig.pt", "all_unormalized.pt"):
        before, after = (torch.load(tmp_path / folder / name) for folder in ("less", "again"))
        assert after.dtype == dtype
        before[before.isnan().all(1)] = 0
        np.testing.assert_array_equal(before.float().numpy(), after.float().numpy(), name)


def test_store_to_less_to_store_is_bit_exact_and_needs_no_flag(tmp_path):
    status = np.zeros(N, np.uint8)
    status[[3, 200]] = Status.NO_LABELS, Status.NON_FINITE
    facts = {"layout": [{"name": "w"}], "precondition": {"kind": "sgd"}}
    store = make_store(tmp_path / "store", features(), status=status, subtasks=["a", "b"] * 125, **facts)
    run("to-less", store.path, tmp_path / "less")
    run("to-store", tmp_path / "less", tmp_path / "again")
    again = FeatureStore(tmp_path / "again")
    np.testing.assert_array_equal(again[:].view(np.uint32), store[:].view(np.uint32))
    np.testing.assert_array_equal(again.norms, store.norms)
    np.testing.assert_array_equal(again.status, store.status)
    assert again.rows == store.rows
    kept = {name: value for name, value in again.facts.items() if name != "converted_from"}
    assert kept == {name: value for name, value in store.facts.items() if name != "layout"}
    assert not again.n_tokens.any()
    before = (tmp_path / "less/all_orig.pt").read_bytes()
    to_less(again, tmp_path / "less-again")
    assert (tmp_path / "less-again/all_orig.pt").read_bytes() == before


def test_converted_stores_have_the_scores_of_their_folders(tmp_path):
    paths: dict[str, list[Path]] = {"train": [], "bbh": []}
    stores: dict[str, list[FeatureStore]] = {"train": [], "bbh": []}
    for name, n in (("train", N), ("bbh", 81)):
        what = ["--examples", examples_file(tmp_path / "e.jsonl")] if name == "train" else ["--task", "bbh"]
        for ckpt in (0, 1):
            folder = less_folder(tmp_path / f"{name}-{ckpt}", torch.from_numpy(features(n, seed=n + ckpt)))
            flags = ["--projection", "fast_jl", "--seed", 0, "--multiprocessors", 108, "--precondition", "sgd", *what]
            run("to-store", folder, tmp_path / f"store-{name}-{ckpt}", *flags)
            paths[name].append(folder)
            stores[name].append(FeatureStore(tmp_path / f"store-{name}-{ckpt}"))
    assert len(set(stores["bbh"][0].rows.subtasks)) == 27
    by_less = influence_scores(paths["train"], {"bbh": paths["bbh"]}, [3, 1])["bbh"]
    by_stores = influence(stores["train"], stores["bbh"], [3, 1]).aggregate()
    np.testing.assert_allclose(by_stores, by_less.numpy(), rtol=0, atol=2e-6)


def test_all_orig_is_taken_where_it_is_all_there_is(tmp_path):
    folder = less_folder(tmp_path / "less", torch.from_numpy(features()))
    (folder / "all_unormalized.pt").unlink()
    source = open_source(folder)
    assert source.facts["file"] == "all_orig.pt" and source.shape == (N, DIM)
    assert torch.equal(torch.from_numpy(source.read(100, 110)), torch.load(folder / "all_orig.pt")[100:110])


def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_ROWS", 100)
    folder = less_folder(tmp_path / "less", torch.from_numpy(features()))
    examples = examples_file(tmp_path / "e.jsonl")
    run("to-store", folder, tmp_path / "whole", *told(examples))
    whole = open_source(folder)

    def killed(start: int, stop: int) -> np.ndarray:
        if start == 100:
            raise KeyboardInterrupt
        return whole.read(start, stop)

    arguments = convert._parser().parse_args(["to-store", str(folder), "out", *told(examples)])
    origin = convert._origin(arguments, whole)
    with pytest.raises(KeyboardInterrupt):
        to_store(convert.Source(whole.path, whole.shape, killed, None, whole.facts), tmp_path / "killed", origin)
    with pytest.raises(LessFastError, match="not finished"):
        FeatureStore(tmp_path / "killed")
    run("to-store", folder, tmp_path / "killed", *told(examples))
    for file in sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*")):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# What is asked for


def flags_without(examples: Path, *left_out: str) -> list[str]:
    flags = told(examples)
    for flag in left_out:
        at = flags.index(flag)
        del flags[at : at + 2]
    return flags


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        (
            ["--projection", "--seed", "--multiprocessors", "--precondition", "--examples"],
            ["projection", "precondition"],
        ),
        (["--seed"], ["seed"]),
        (["--multiprocessors"], ["multiprocessors"]),
        (["--precondition", "--examples"], ["precondition", "examples"]),
    ],
)
def test_missing_facts_are_asked_for_by_flag(tmp_path, left_out, named):
    folder = less_folder(tmp_path / "less", torch.from_numpy(features()))
    with pytest.raises(LessFastError, match="does not say what it was made with; give") as caught:
        run("to-store", folder, tmp_path / "s", *flags_without(examples_file(tmp_path / "e.jsonl"), *left_out))
    for flag in named:
        assert f"--{flag} (" in str(caught.value)
    given = {"projection", "seed", "multiprocessors", "precondition"} - {flag[2:] for flag in left_out}
    assert not any(f"--{flag} (" in str(caught.value) for flag in given)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("kind", "flags", "missing"),
    [("srht", [], "seed.*block"), ("sjlt", ["--seed", "0"], "nnz"), ("trak_basic", ["--seed", "0"], "block")],
)
def test_each_projection_has_facts_of_its_own(tmp_path, kind, flags, missing):
    folder = less_folder(tmp_path / "less", torch.from_numpy(features()))
    rest = ["--precondition", "sgd", "--examples", examples_file(tmp_path / "e.jsonl")]
    with pytest.raises(LessFastError, match=missing):
        run("to-store", folder, tmp_path / "s", "--projection", kind, *flags, *rest)


def test_less_fast_projections_and_the_fallback_of_trak_are_told_apart(tmp_path):
    folder = less_folder(tmp_path / "less", torch.from_numpy(features()))
    rest = ["--seed", "5", "--block", "16", "--precondition", "sign", "--examples", examples_file(tmp_path / "e.jsonl")]
    run("to-store", folder, tmp_path / "ours", "--projection", "srht", *rest)
    run("to-store", folder, tmp_path / "trak", "--projection", "trak_basic", *rest)
    ours, trak = FeatureStore(tmp_path / "ours"), FeatureStore(tmp_path / "trak")
    assert ours.projection.to_dict() == {"kind": "srht", "dim": DIM, "seed": 5, "block": 16}
    assert "projector" not in ours.facts and trak.facts["projector"] == "trak BasicProjector, block 16"
    assert ours.facts["precondition"] == {"kind": "sign"}


def test_facts_that_do_not_fit_are_refused(tmp_path):
    folder = less_folder(tmp_path / "less", torch.from_numpy(features()))
    flags = told(examples_file(tmp_path / "e.jsonl", N - 1))
    with pytest.raises(LessFastError, match="has 250 rows, but 249 examples"):
        run("to-store", folder, tmp_path / "s", *flags)
    flags = told(examples_file(tmp_path / "e.jsonl"))
    with pytest.raises(LessFastError, match="has 32 features a row, not 64"):
        run("to-store", folder, tmp_path / "s", *flags, "--dim", 64)
    with pytest.raises(LessFastError, match="--task bbh has 27 subtasks of equal size, which 250 rows are not"):
        run("to-store", folder, tmp_path / "s", *flags_without(tmp_path, "--examples"), "--task", "bbh")
    store = make_store(tmp_path / "store", features())
    to_less(store, tmp_path / "ours")
    with pytest.raises(LessFastError, match="less_fast made it"):
        run("to-store", tmp_path / "ours", tmp_path / "s", *flags)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(LessFastError, match=r"all_orig\.pt or one all_quantized"):
        run("to-store", tmp_path / "nothing", tmp_path / "s", *flags)


def test_damage_is_found_before_anything_is_made(tmp_path):
    store = make_store(tmp_path / "store", features())
    to_less(store, tmp_path / "less")
    to_qless(store, tmp_path / "qless", 8)
    for file in (tmp_path / "less/all_unormalized.pt", tmp_path / "qless/all_quantized_8bits_absmax.pt"):
        data = bytearray(file.read_bytes())
        data[-2000] ^= 1  # within a tensor
        file.write_bytes(bytes(data))
        with pytest.raises(LessFastError, match=r"bytes, expected|damaged"):
            run("to-store", file.parent, tmp_path / "s")
    (shard, *_) = sorted((store.path / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    for out in (["less-2"], ["qless-2", "--qless_bits", "4"]):
        with pytest.raises(LessFastError, match=r"bytes, expected|damaged"):
            run("to-less", store.path, tmp_path / out[0], *out[1:])
        assert not (tmp_path / out[0]).exists()


# QLESS: its quantisation and its packing, written plainly from their description


def qless_file(path: Path, all_orig: torch.Tensor, bits: int, absmax: float | None) -> tuple[torch.Tensor, dict]:
    measure = torch.max(all_orig.abs()) if absmax is None else absmax
    top = 2 ** (bits - 1) - 1
    if bits == 1:
        scale, codes, offset = measure, (all_orig > 0).to(torch.uint8), 0
    else:
        scale = top / measure
        codes = torch.clamp((all_orig * scale).round(), -top, top)
        offset = torch.max(codes.abs())
    flat = (codes.flatten() + offset).to(torch.uint8)
    quarter = len(flat) * bits // 8
    packed = torch.zeros(quarter, dtype=torch.uint8)
    for part in range(8 // bits):
        packed |= flat[part * quarter : (part + 1) * quarter] << (8 - bits * (part + 1))
    meta = {"nbits": bits, "shape": all_orig.shape, "scale_factor": scale, "offset": offset}
    value = (packed, {**meta, "packing": f"{bits}bit_u8", "absmeasure": "max"})
    torch.save(value, path)
    return value


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("absmax", [None, 0.9])
def test_packed_files_are_those_of_qless(tmp_path, bits, absmax):
    store = make_store(tmp_path / "store", features())
    to_less(store, tmp_path / "less")
    all_orig = torch.load(tmp_path / "less/all_orig.pt")
    packed, meta = qless_file(tmp_path / "theirs.pt", all_orig, bits, absmax)
    more = [] if absmax is None else ["--absmax", absmax]
    run("to-less", store.path, tmp_path / "qless", "--qless_bits", bits, *more)
    codes, ours = torch.load(tmp_path / f"qless/all_quantized_{bits}bits_absmax.pt")
    assert torch.equal(codes, packed)
    assert ours.keys() - meta.keys() == {"less_fast", "less_fast_sha256"}
    assert {name: ours[name] for name in ("nbits", "shape", "packing", "absmeasure")} == {
        name: meta[name] for name in ("nbits", "shape", "packing", "absmeasure")
    }
    assert float(ours["scale_factor"]) == pytest.approx(float(meta["scale_factor"]), rel=1e-6)
    assert float(ours["offset"]) == float(meta["offset"])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_qless_to_store_to_qless_keeps_every_code(tmp_path, bits):
    (tmp_path / "qless").mkdir()
    name = f"all_quantized_{bits}bits_absmax.pt"
    all_orig = torch.nn.functional.normalize(torch.from_numpy(features()), dim=1)
    packed, meta = qless_file(tmp_path / "qless" / name, all_orig, bits, 0.9)
    run("to-store", tmp_path / "qless", tmp_path / "store", *told(examples_file(tmp_path / "e.jsonl")))
    store = FeatureStore(tmp_path / "store")
    assert store.facts["converted_from"]["bits"] == bits
    scale = float(meta["scale_factor"])
    if bits == 1:
        expected = torch.where(all_orig > 0, scale, -scale)
        torch.testing.assert_close(torch.from_numpy(store[:]), expected, rtol=1e-6, atol=0)
    else:  # no value is further from its code's than half a step
        assert np.abs(store[:] - all_orig.numpy()).max() <= 0.5 / scale * (1 + 1e-5)
    source = read_packed(tmp_path / "qless" / name)
    np.testing.assert_array_equal(source.rows(0, N), store[:])
    np.testing.assert_array_equal(source.rows(33, 201), store[33:201])
    run("to-less", store.path, tmp_path / "again", "--qless_bits", bits)
    codes, again = torch.load(tmp_path / "again" / name)
    assert torch.equal(codes, packed) and float(again["offset"]) == float(meta["offset"])
    assert float(again["scale_factor"]) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("bits", [1, 8])
def test_rows_without_features_keep_their_status_through_a_packed_file(tmp_path, bits):
    status = np.zeros(N, np.uint8)
    status[9] = Status.NO_LABELS
    store = make_store(tmp_path / "store", features(), status=status)
    file = to_qless(store, tmp_path / "qless", bits)
    np.testing.assert_array_equal(read_packed(file).rows(9, 10) > 0, np.zeros((1, DIM), bool))
    run("to-store", tmp_path / "qless", tmp_path / "again")
    again = FeatureStore(tmp_path / "again")
    np.testing.assert_array_equal(again.status, status)
    assert again.rows == store.rows and again.projection == store.projection


def test_packed_files_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(LessFastError, match="do not fill bytes with 1 bits"):
        to_qless(make_store(tmp_path / "store", features(3)[:, :3]), tmp_path / "qless", 1)
    with pytest.raises(LessFastError, match="no files of 3 bits"):
        to_qless(FeatureStore(tmp_path / "store"), tmp_path / "qless", 3)
    with pytest.raises(LessFastError, match="absmax is 0"):
        to_qless(FeatureStore(tmp_path / "store"), tmp_path / "qless", 8, absmax=0.0)
    for value in (torch.zeros(3), (torch.zeros(3, dtype=torch.uint8), {"nbits": 8, "shape": (2, 2)}), ([1], {})):
        torch.save(value, tmp_path / "all_quantized_8bits_absmax.pt")
        with pytest.raises(LessFastError, match="not a file of QLESS's"):
            open_source(tmp_path / "all_quantized_8bits_absmax.pt")
    assert Quantiser(8, 0.0).scale == 1.0
