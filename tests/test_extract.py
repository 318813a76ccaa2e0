"""extract(): equal to single features, the same bits after kill -9, statuses, out-of-memory, several outputs."""

from __future__ import annotations

import errno
import filecmp
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import adapted
from support.tiny import examples, save_tiny_llama, write_jsonl

from less_fast import extraction, shard_job
from less_fast.data import CPU_BATCH_COST, collate, encode_all, load_examples, plan_batches
from less_fast.errors import LessFastError
from less_fast.extraction import extract, extract_many, prepare
from less_fast.features import FeatureExtractor, MultiFeatureExtractor, Output
from less_fast.model import load_model
from less_fast.model.compiled import compiled
from less_fast.projection import Projection
from less_fast.store import FeatureStore, Status, StoreWriter

SRHT = Projection("srht", 256, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with an adapter, and 30 examples of very different lengths."""
    root = tmp_path_factory.mktemp("extract")
    save_tiny_llama(root / "model")
    rows = examples("names", 30)
    for i, row in enumerate(rows):
        row["messages"][1]["content"] *= 1 + i * 7 % 5
    write_jsonl(root / "pool.jsonl", rows)
    model, _ = load_model(root / "model", device="cpu")
    adapter = adapted(model)
    adapter.save_pretrained(root / "adapter")
    return root


def run(folder: Path, out: Path, **settings: object) -> FeatureStore:
    model, tokenizer = load_model(folder / "model", folder / "adapter", device="cpu")
    options = {"projection": SRHT, "tokenizer": tokenizer, "shard_size": 7, "token_budget": 200, "progress": False}
    return extract(model, folder / "pool.jsonl", out, **{**options, **settings})


def test_the_store_holds_the_features_in_dataset_order(folder: Path, tmp_path: Path) -> None:
    store = run(folder, tmp_path / "store")
    model, tokenizer = load_model(folder / "model", folder / "adapter", device="cpu")
    extractor = FeatureExtractor(model, SRHT)
    pool = load_examples(folder / "pool.jsonl")
    assert len(store) == 30 and store.rows.ids == pool.ids
    for i, encoded in enumerate(encode_all(pool, tokenizer)):
        alone = extractor(collate([encoded], 0))[0].numpy()
        assert np.linalg.norm(store[i] - alone) < 1e-5 * np.linalg.norm(alone)
        assert (store.n_tokens[i], store.n_labels[i]) == (len(encoded.input_ids), encoded.n_labels)
    assert store.projection == SRHT and (store.status == Status.OK).all() and store.verify().ok
    assert store.manifest["layout_hash"] == extractor.layout.hash


def same_files(a: Path, b: Path) -> None:
    names = sorted(str(p.relative_to(a)) for p in a.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(b)) for p in b.rglob("*") if p.is_file())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from typing import Any
import time
import test_extract
from less_fast.store import StoreWriter
write = StoreWriter.write
def slowly(*args, **kwargs):
    write(*args, **kwargs)
    time.sleep(0.2)  # so that whoever kills this can choose the moment
StoreWriter.write = slowly
test_extract.run(Path({folder!r}), Path({out!r}))
"""


def test_kill_and_resume_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "whole")
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), out=str(tmp_path / "killed"))
    shards = tmp_path / "killed" / "shards"
    for wanted in (1, 3):  # of 5 shards
        process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
        while len(list(shards.glob("*.safetensors"))) < wanted:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wanted <= len(list(shards.glob("*.safetensors"))) < 5
    run(folder, tmp_path / "killed")
    same_files(tmp_path / "whole", tmp_path / "killed")


def test_a_second_run_computes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(folder, tmp_path / "store")

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(MultiFeatureExtractor, "__call__", refuse)
    assert np.array_equal(run(folder, tmp_path / "store")[:], first[:])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LessFastError("the disk is full")], ids=["ctrl-c", "write"])
def test_an_interrupted_run_keeps_whole_shards_and_resumes_to_the_same_bits(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path / "whole")
    threads = threading.active_count()
    with monkeypatch.context() as patch:
        if isinstance(error, KeyboardInterrupt):
            collate_shard, seen = shard_job.plan_batches, []

            def interrupted(lengths: list[int], *args: object, **kwargs: object) -> list[list[int]]:
                seen.append(lengths)
                if len(seen) == 4:  # shards
                    raise error
                return collate_shard(lengths, *args, **kwargs)  # type: ignore[arg-type]

            patch.setattr(shard_job, "plan_batches", interrupted)
        else:
            write = StoreWriter.write

            def failing(self: StoreWriter, shard: int, *args: object, **kwargs: object) -> None:
                if shard == 3:
                    raise error
                write(self, shard, *args, **kwargs)  # type: ignore[arg-type]

            patch.setattr(StoreWriter, "write", failing)
        with pytest.raises(type(error)) as raised:
            run(folder, tmp_path / "part")
        assert raised.value is error
    # What was handed to the writer before is there, nothing else, and no thread is left behind.
    assert sorted(p.name for p in (tmp_path / "part/shards").iterdir()) == [f"0000{i}.safetensors" for i in range(3)]
    assert threading.active_count() == threads
    run(folder, tmp_path / "part")
    same_files(tmp_path / "whole", tmp_path / "part")


def test_packed_batches_give_the_same_features_in_a_store_of_their_own_kind(folder: Path, tmp_path: Path) -> None:
    padded, packed = run(folder, tmp_path / "padded"), run(folder, tmp_path / "packed", packing="always")
    np.testing.assert_array_less(
        np.linalg.norm(packed[:] - padded[:], axis=1), 1e-5 * np.linalg.norm(padded[:], axis=1)
    )
    batches = {store.path.name: store.manifest["numerics"]["batches"] for store in (padded, packed)}
    assert batches == {"padded": "padded", "packed": "packed, scaled_dot_product_attention"}
    with pytest.raises(LessFastError, match=r'numerics\.batches: "packed, scaled_dot_product_attention" -> "padded"'):
        run(folder, tmp_path / "packed")
    sizes: list[int] = []
    original = MultiFeatureExtractor.__call__
    with pytest.MonkeyPatch.context() as patch:

        def measured(self: MultiFeatureExtractor, batch: dict[str, torch.Tensor]) -> object:
            sizes.append(int(batch["attention_mask"].sum()))
            return original(self, batch)

        patch.setattr(MultiFeatureExtractor, "__call__", measured)
        run(folder, tmp_path / "again", packing="always", token_budget=400)
    assert max(sizes) <= 400 and len(sizes) < 30  # real tokens fill the budget
    same = run(folder, tmp_path / "again", packing="always", token_budget=400)
    np.testing.assert_allclose(same[:], padded[:], rtol=1e-3, atol=1e-5 * np.abs(padded[:]).max())


def test_a_compiled_model_is_recorded_and_put_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(folder, tmp_path / "plain")
    model, tokenizer = load_model(folder / "model", folder / "adapter", device="cpu")
    used: list[int] = []

    def during(self: MultiFeatureExtractor, batch: dict[str, torch.Tensor]) -> object:
        used.append(sum(module._compiled_call_impl is not None for module in self.model.modules()))
        return original(self, batch)

    original = MultiFeatureExtractor.__call__
    monkeypatch.setattr(MultiFeatureExtractor, "__call__", during)
    monkeypatch.setattr(extraction, "compiled", partial(compiled, backend="eager"))
    options = {"projection": SRHT, "shard_size": 7, "token_budget": 200, "progress": False, "compile_model": True}
    store = extract(model, folder / "pool.jsonl", tmp_path / "compiled", tokenizer=tokenizer, **options)
    np.testing.assert_allclose(store[:], plain[:], rtol=1e-3, atol=1e-5 * np.abs(plain[:]).max())
    assert set(used) == {6}  # two norms and an MLP in each of two layers
    assert not any(module._compiled_call_impl for module in model.modules())
    assert store.manifest["numerics"]["compiled"] is True and plain.manifest["numerics"]["compiled"] is False
    with pytest.raises(LessFastError, match=r"numerics\.compiled: true -> false"):
        run(folder, tmp_path / "compiled")


def test_few_batches_are_in_flight(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features wait for their copies to the host while the next batches are started, but not for all of a shard."""
    flying: list[int] = [0, 0]

    class Counted(shard_job.Fetch):
        def __init__(self, tensors: list[torch.Tensor]) -> None:
            super().__init__(tensors)
            flying[0] += 1
            flying[1] = max(flying)

        def wait(self) -> list[torch.Tensor]:
            flying[0] -= 1
            return super().wait()

    monkeypatch.setattr(shard_job, "Fetch", Counted)
    run(folder, tmp_path / "store", token_budget=60)  # nearly a batch an example
    assert flying == [0, 3]


def test_other_settings_are_refused_and_named(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "store")
    with pytest.raises(LessFastError, match=r"seed.*5.*6"):
        run(folder, tmp_path / "store", projection=Projection("srht", 256, seed=6))
    with pytest.raises(LessFastError, match=r"max_length.*2048.*64"):
        run(folder, tmp_path / "store", max_length=64)
    model, tokenizer = load_model(folder / "model", folder / "adapter", device="cpu")
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    with pytest.raises(LessFastError, match="adapter"):
        extract(model, folder / "pool.jsonl", tmp_path / "store", projection=SRHT, tokenizer=tokenizer, shard_size=7)


def test_several_outputs_share_one_pass(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder / "model", folder / "adapter", device="cpu")
    outputs = {tmp_path / "big": Output(SRHT), tmp_path / "small": Output(Projection("srht", 64, seed=5), "sign")}
    stores = extract_many(
        model,
        folder / "pool.jsonl",
        outputs,
        tokenizer=tokenizer,
        shard_size=7,
        token_budget=200,
        progress=False,
    )
    np.testing.assert_array_equal(stores[tmp_path / "big"][:], run(folder, tmp_path / "alone")[:])
    signs = run(folder, tmp_path / "sign", projection=Projection("srht", 64, seed=5), precondition="sign")
    np.testing.assert_array_equal(stores[tmp_path / "small"][:], signs[:])


def test_rows_without_labels_or_not_finite_get_a_status(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load_model(folder / "model", folder / "adapter", device="cpu")
    long = {
        "id": "long",
        "messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "x"}],
    }
    poison = {"id": "poison", "messages": [{"role": "user", "content": "@"}, {"role": "assistant", "content": "@"}]}
    fine = {"id": "fine", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    token = tokenizer("@", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.inf
    store = extract(
        model,
        [fine, long, poison, fine],
        tmp_path / "store",
        projection=SRHT,
        tokenizer=tokenizer,
        max_length=40,
        progress=False,
    )
    assert store.status.tolist() == [Status.OK, Status.NO_LABELS, Status.NON_FINITE, Status.OK]
    assert not store[1:3].any() and np.isfinite(store[:]).all() and store[0].any()
    assert "1 of 4 examples were cut" in caplog.text
    assert "have no label token" in caplog.text and "long" in caplog.text
    assert "non-finite" in caplog.text and "poison" in caplog.text


def test_out_of_memory_halves_the_budget_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(folder, tmp_path / "whole")
    original = MultiFeatureExtractor.__call__
    failed: list[int] = []

    def limited(self: MultiFeatureExtractor, batch: dict[str, torch.Tensor]) -> object:
        if batch["input_ids"].numel() > 260:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    monkeypatch.setattr(MultiFeatureExtractor, "__call__", limited)
    store = run(folder, tmp_path / "limited", token_budget=1600)
    budgets = [shard["facts"]["token_budget"] for shard in store.manifest["shards"]]

    def largest(lengths: list[int], budget: int) -> int:
        batches = plan_batches(lengths, budget, batch_cost=CPU_BATCH_COST)
        return max(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    for shard, budget in enumerate(budgets):  # the first one that works, whatever the shards before it needed
        lengths = store.n_tokens[7 * shard : 7 * shard + 7].tolist()
        assert budget == next(b for b in (1600, 800, 400, 200, 100) if largest(lengths, b) <= 260)
    assert len(set(budgets)) > 1 and sum(failed) < 2 * len(budgets)
    assert "token budget is now 800" in caplog.text
    np.testing.assert_allclose(store[:], whole[:], rtol=1e-3, atol=1e-5 * np.abs(whole[:]).max())
    # A shard that is made again, or before the others, has the same bits.
    for shard in (0, len(budgets) - 1):
        file = tmp_path / "limited" / store.manifest["shards"][shard]["file"]
        before = file.read_bytes()
        file.unlink()
        with pytest.warns(UserWarning, match="missing"):
            run(folder, tmp_path / "limited", token_budget=1600)
        assert file.read_bytes() == before
    for shard in (4, 2, 3, 0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(folder, tmp_path / "turned", token_budget=1600, shard_range=(shard, shard + 1))
    same_files(tmp_path / "limited", tmp_path / "turned")
    monkeypatch.setattr(MultiFeatureExtractor, "__call__", lambda self, batch: limited(self, {"input_ids": ids(1000)}))
    with pytest.raises(LessFastError, match="single example"):
        run(folder, tmp_path / "impossible")


def ids(n: int) -> torch.Tensor:
    return torch.zeros(1, n, dtype=torch.long)


def test_what_a_failed_attempt_has_claimed_is_made_by_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(folder / "model", folder / "adapter", device="cpu")
    outputs = {tmp_path / "store": Output(SRHT)}
    extraction = prepare(model, folder / "pool.jsonl", outputs, tokenizer=tokenizer, shard_size=7, token_budget=200)
    original, attempts = StoreWriter.put, []

    def put(self: StoreWriter, shard: int, *arguments: Any, **facts: Any) -> Any:
        attempts.append(shard)
        if len(attempts) == 1:
            raise OSError(errno.EIO, "gone for a while")
        return original(self, shard, *arguments, **facts)

    monkeypatch.setattr(StoreWriter, "put", put)
    with ExitStack() as stack:
        writers = extraction.open(stack, shared=True)
        with pytest.raises(OSError, match="gone for a while"):
            extraction.job.put(writers, [0, 1, 2])
        (entries,) = extraction.job.put(writers, [0, 1, 2])
        assert set(attempts) == {0, 1, 2}
        writers[0].refresh()
        assert writers[0].pending() == [3, 4] and 0 in entries


def test_the_settings_are_in_the_signatures() -> None:
    many, one = (list(inspect.signature(function).parameters) for function in (extract_many, extract))
    settings = [name for name, p in inspect.signature(prepare).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert many == ["model", "dataset", "outputs", "shared", "shard_range", "progress", *settings]
    assert one == ["model", "dataset", "out", "projection", "precondition", *many[3:]]
    assert all(name in str(extract_many.__doc__) for name in settings)


def test_bad_settings_are_named(folder: Path, tmp_path: Path) -> None:
    for settings, word in [({"token_budget": 0}, "token_budget"), ({"max_length": 0}, "max_length")]:
        with pytest.raises(LessFastError, match=word):
            run(folder, tmp_path / "store", **settings)
    with pytest.raises(LessFastError, match="no such"):
        model, tokenizer = load_model(folder / "model", folder / "adapter", device="cpu")
        extract(model, tmp_path / "absent.jsonl", tmp_path / "store", tokenizer=tokenizer)


def test_load_model_names_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LessFastError, match="no such folder"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LessFastError, match="no causal language model"):
        load_model(tmp_path / "empty")
    with pytest.raises(LessFastError, match="dtype"):
        load_model(folder / "model", dtype="int8")
    with pytest.raises(LessFastError, match="device"):
        load_model(folder / "model", device="gpu!")
    model, tokenizer = load_model(folder / "model", device="cpu")
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(50)])
    tokenizer.save_pretrained(tmp_path / "bigger")
    model.save_pretrained(tmp_path / "bigger")
    with pytest.raises(LessFastError, match=r"tokenizer has \d+ tokens but the model's embedding has \d+ rows"):
        load_model(tmp_path / "bigger")
    # An adapter's own folder is enough where it names its base.
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == folder / "model"
    again, _ = load_model(folder / "adapter", device="cpu")
    assert any("lora_A" in name for name, _ in again.named_parameters())


@pytest.mark.skipif("LESS_FAST_DATA" not in os.environ, reason="LESS_FAST_DATA is not set: no real examples")
def test_real_examples_and_a_real_model(tmp_path: Path) -> None:
    data = Path(os.environ["LESS_FAST_DATA"])
    model, tokenizer = load_model(data / "models/stories260K-hf", device="cpu")
    model = adapted(model)
    pool = load_examples(data / "pool_2k.jsonl.gz").take(range(40))
    store = extract(model, pool, tmp_path / "s", projection=SRHT, tokenizer=tokenizer, max_length=256, progress=False)
    features, valid = store[:], store.status == Status.OK
    assert valid.sum() >= 20 and np.isfinite(features).all() and (np.linalg.norm(features[valid], axis=1) > 0).all()
