"""bergson's interfaces against bergson itself, which runs in a process of its own, and against float64 autograd."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support.models import adapted, causal_lm, gradients
from support.stores import make_store, refusal
from support.tiny import save_tiny_llama
from support.upstream import packages, run_tests, sdist
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from less_fast import influence
from less_fast.compat.bergson import ModuleCollector, ModuleProjection, build_index, random_matrix, write_index
from less_fast.data import Encoded, collate
from less_fast.model import load_model
from less_fast.store import Status

BERGSON = "bergson==2.5.1"
# What its Python interface and `query` import beyond our own dependencies.
NEEDED = ("jaxtyping", "wadler-lindig", "ml-dtypes", "simple-parsing", "docstring-parser", "petname")

Case = dict[str, Any]
CASES: dict[str, Case] = {
    "llama": {"model": "llama", "projection": {"dim": 4}},
    "normal, mean, seed": {
        "model": "llama",
        "projection": {"dim": 5, "type": "normal", "seed": 7},
        "loss_reduction": "mean",
    },
    "row_norm": {"model": "llama", "projection": {"dim": 3, "scale": "row_norm"}},
    "whole": {"model": "llama", "projection": None},
    "lora": {"model": "lora", "projection": {"dim": 4}},
    "gpt2": {"model": "gpt2", "projection": {"dim": 4}},
    "bfloat16": {"model": "llama", "projection": {"dim": 4}, "dtype": "bfloat16"},
}
PREFIXES = {"llama": "model.", "lora": "base_model.", "gpt2": "transformer."}
MATRICES = [
    (name, m, n, kind)
    for name, m, n in (("layer/left", 2, 4), ("layer/right/seed3", 7, 1001), ("x", 3, 300_001), ("é", 129, 128))
    for kind in ("rademacher", "normal")
]
JOBS = Path(__file__).parent / "support" / "bergson_jobs.py"
QUERIES = ["What is 4 + 4?", "Greet the guest."]


def load(folder: Path, case: Case) -> nn.Module:
    model, _ = load_model(folder / case["model"], dtype=case.get("dtype", "float32"))
    return model


def collector_of(model: nn.Module, case: Case, **settings: Any) -> ModuleCollector:
    projection = None if case["projection"] is None else ModuleProjection(**case["projection"])
    return ModuleCollector(model, projection, loss_reduction=case.get("loss_reduction", "sum"), **settings)


def read(index: Path) -> dict[str, np.ndarray]:
    """The gradients of an index by module, as float32."""
    info = json.loads((index / "info.json").read_text())
    sizes, dtype = info["grad_sizes"], getattr(torch, info["base_dtype"])
    stored = torch.from_numpy(np.fromfile(index / "gradients.bin", np.uint8)).view(dtype)
    flat = stored.float().numpy().reshape(info["num_items"], sum(sizes.values()))
    return dict(zip(sizes, np.split(flat, np.cumsum(list(sizes.values()))[:-1], axis=1)))


@pytest.fixture(scope="module")
def bergson() -> Path:
    return packages(BERGSON, *NEEDED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bergson: Path) -> Path:
    """Models, data, our indexes (``ours/NAME``), bergson's (``theirs/NAME``) and what it found in ours."""
    place = tmp_path_factory.mktemp("bergson")
    save_tiny_llama(place / "llama")
    base, tokenizer = load_model(place / "llama")
    adapted(base).save_pretrained(place / "lora")
    tokenizer.save_pretrained(place / "lora")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(place / "gpt2")
    tokenizer.save_pretrained(place / "gpt2")

    texts = [
        "What is 2 + 2?",
        "It is 4.",
        "Greet guest number 7, please.",
        "Good evening, dear guest!",
        "No",
        "Yes, of course",
    ]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    # The first half of each is a prompt; one example has no labels at all.
    labels = [
        [-100 if t < len(row) // 2 or i == 4 else token for t, token in enumerate(row)] for i, row in enumerate(ids)
    ]
    data = datasets.Dataset.from_dict({"text": texts, "input_ids": ids, "labels": labels})
    data.save_to_disk(str(place / "data"))
    for name, case in CASES.items():
        collector, index = collector_of(load(place, case), case), place / "ours" / name
        settings = {"dtype": case.get("dtype", "float32"), "token_budget": 40, "progress": False}
        assert build_index(collector, data, index, model_path=place / case["model"], **settings) == index

    features = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    status = np.zeros(9, np.uint8)
    status[2], features[2] = Status.NO_LABELS, 0.0
    store = make_store(place / "store", features, status=status, subtasks=["a", None, "b"] * 3)
    make_store(place / "targets", features[3:6] + features[6:9], subtasks=["x", "y", "z"])
    np.save(place / "queries.npy", features[3:6] + features[6:9])
    write_index(store, place / "store index")
    for dtype in ("float16", "bfloat16"):
        write_index(place / "store", place / f"store index {dtype}", dtype=dtype)

    jobs = {"cases": CASES, "matrices": MATRICES, "queries": QUERIES, "queried": ["llama", "lora"]}
    done = subprocess.run(
        [sys.executable, str(JOBS), json.dumps(jobs)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(bergson)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "found.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("i", range(len(MATRICES)), ids=lambda i: f"{MATRICES[i][3]} {MATRICES[i][1]}x{MATRICES[i][2]}")
def test_matrices_are_equal_bit_for_bit(i: int, found: dict[str, np.ndarray]) -> None:
    identifier, m, n, kind = MATRICES[i]
    ours = random_matrix(identifier, m, n, "cpu", kind)
    assert ours.dtype == torch.float32 and ours.shape == (m, n)
    np.testing.assert_array_equal(ours.numpy(), found[f"matrix {i}"])
    narrow = random_matrix(identifier, m, n, torch.device("cpu"), kind, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    np.testing.assert_array_equal(narrow.float().numpy(), found[f"narrow {i}"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_matrices_are_the_same_on_the_gpu(kind: str) -> None:
    for m, n in ((2, 4), (7, 1001), (64, 300_001)):
        here, there = (random_matrix("layer/left", m, n, device, kind) for device in ("cpu", "cuda"))
        assert there.is_cuda and torch.equal(there.cpu(), here)


def test_bergsons_own_tests_of_its_matrices_pass_with_ours(bergson: Path, tmp_path: Path) -> None:
    tests = sdist(BERGSON) / "tests"
    calls = tmp_path / "calls"
    (tmp_path / "our_matrices.py").write_text(
        "import bergson.collector.collector as collector\n"
        "import bergson.collector.projection_matrix as matrices\n"
        "from less_fast.compat.bergson import random_matrix\n"
        "calls = 0\n"
        "def ours(*args, **kwargs):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return random_matrix(*args, **kwargs)\n"
        "collector.random_matrix = matrices.random_matrix = ours\n"
        "def pytest_sessionfinish():\n"
        f"    open({str(calls)!r}, 'w').write(str(calls))\n"
    )
    outcomes = run_tests(
        [tests / "test_projection_matrix.py", tests / "test_projection_inner_products.py"],
        [tmp_path, bergson],
        "-p",
        "our_matrices",
    )
    passing = {
        *(f"test_philox_matches_reference_implementation[counter{i}-key{i}-expected{i}]" for i in range(3)),
        "test_matrices_are_pinned",
        "test_normal_entries_are_standard_normal",
        "test_rejects_unknown_type_and_oversized_matrices",
        "test_projection_scale_does_not_depend_on_module_shape",
        "test_single_sided_projection_is_unbiased",
        "test_projection_matrix_is_deterministic_in_identifier",
        "test_row_norm_scale_reproduces_legacy_matrices",
        *(
            f"{name}[{kind}]"
            for kind in ("rademacher", "normal")
            for name in (
                "test_entries_do_not_depend_on_the_shape",
                "test_entries_are_uncorrelated",
                "test_projection_preserves_inner_products",
                "test_projection_entry_variance_is_one_over_output_dim",
            )
        ),
    }
    on_cuda = {
        *(f"test_cuda_matches_cpu[shape{i}]" for i in range(4)),
        *(
            f"test_cuda_bf16_matches_rounded_fp32[{n}-{kind}]"
            for n in (13824, 13825)
            for kind in ("normal", "rademacher")
        ),
        *(f"test_cuda_generates_other_dtypes_in_slabs[{kind}]" for kind in ("normal", "rademacher")),
    }
    # These break bergson's own kernel and expect it to be reported; ours has no other way to fall back to.
    of_its_kernel = {f"test_cuda_falls_back_when_the_kernel_fails[{kind}]" for kind in ("normal", "rademacher")}
    if torch.cuda.is_available():
        expected = dict.fromkeys(passing | on_cuda, "passed") | dict.fromkeys(of_its_kernel, "failed")
    else:
        expected = dict.fromkeys(passing, "passed") | dict.fromkeys(on_cuda | of_its_kernel, "skipped")
    assert {name: outcome.partition(":")[0] for name, outcome in outcomes.items()} == expected
    assert int(calls.read_text()) > 10_000


def exact_gradients(folder: Path, case: Case, names: list[str]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """(N, P) float64 gradients of the mean losses with respect to the modules' weights, and their shapes."""
    data = datasets.load_from_disk(str(folder / "data"))
    model = load(folder, case)
    batch = collate([Encoded(row["input_ids"], row["labels"], False) for row in data], pad_id=0)
    weights = [f"{PREFIXES[case['model']]}{name}.weight" for name in names]
    parameters = dict(model.named_parameters())
    return gradients(model, weights, batch), [tuple(parameters[weight].shape) for weight in weights]


@pytest.mark.parametrize("name", CASES)
def test_module_features_are_those_that_bergson_builds(name: str, folder: Path) -> None:
    case = CASES[name]
    ours, theirs = read(folder / "ours" / name), read(folder / "theirs" / f"{name}.part")
    assert list(ours) == list(theirs)
    flat, shapes = exact_gradients(folder, case, list(ours))
    projection = case["projection"] and ModuleProjection(**case["projection"])
    data = datasets.load_from_disk(str(folder / "data"))
    counts = np.array([sum(label != -100 for label in row[1:]) for row in data["labels"]])
    has_labels = counts > 0
    assert has_labels.tolist() == [True, True, True, True, False, True]
    times = counts if case.get("loss_reduction", "sum") == "sum" else np.ones(6)
    start, total = 0, 0.0
    for (module, mine), bergsons, shape in zip(ours.items(), theirs.values(), shapes):
        exact = flat[:, start : start + math.prod(shape)].unflatten(1, shape)
        start += math.prod(shape)
        exact = exact.mT if case["model"] == "gpt2" else exact  # Conv1D keeps its weight as (input, output)
        if projection:
            sides = zip(("left", "right"), exact.shape[1:])
            left, right = (projection.matrix(module, side, n, torch.device("cpu"), torch.float64) for side, n in sides)
            exact = left @ exact @ right.T
        reference = exact.flatten(1).numpy()[has_labels] * times[has_labels, None]
        error, allowed, size = (
            float(np.sqrt(np.mean(x**2)))
            for x in (mine[has_labels] - reference, bergsons[has_labels] - reference, reference)
        )
        assert error <= 2 * allowed + 1e-6 * size, module
        assert not mine[~has_labels].any()
        total += size
    assert total > 0 and start == flat.shape[1]


@pytest.mark.parametrize("name", CASES)
def test_everything_else_in_the_index_is_as_bergson_writes_it(name: str, folder: Path) -> None:
    ours, theirs = folder / "ours" / name, folder / "theirs" / f"{name}.part"
    extra = {"config.yaml"}  # bergson's command line writes it
    assert {path.name for path in ours.iterdir()} - {path.name for path in theirs.iterdir()} == extra
    assert {path.name for path in theirs.iterdir()} <= {path.name for path in ours.iterdir()}
    for file in ("info.json", "processor_config.yaml"):
        parse = json.loads if file == "info.json" else yaml_of
        assert parse((ours / file).read_text()) == parse((theirs / file).read_text()), file
    for file in ("total_processed.pt", "normalizers.pth", "hessians.pth", "hessians_eigen.pth"):
        assert torch.load(ours / file) == torch.load(theirs / file), file
    mine, bergsons = (datasets.load_from_disk(str(index / "data.hf")) for index in (ours, theirs))
    assert mine.features == bergsons.features
    assert list(mine["input_ids"]) == list(bergsons["input_ids"])
    losses = np.array(bergsons["loss"])
    losses[4] = 0.0  # the mean of no label; NaN in bergson's
    # In a bfloat16 model bergson computes the loss in bfloat16 too.
    np.testing.assert_allclose(mine["loss"], losses, rtol=0.02 if name == "bfloat16" else 1e-5, atol=1e-6)


def yaml_of(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def test_bergsons_builder_and_scorer_take_our_gradients(folder: Path, found: dict[str, np.ndarray]) -> None:
    built, ours = read(folder / "built"), read(folder / "ours" / "llama")
    assert list(built) == list(ours)
    flat = np.concatenate(list(ours.values()), axis=1)
    np.testing.assert_allclose(np.concatenate(list(built.values()), axis=1), flat, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["mean"][0], flat.mean(0), rtol=1e-4, atol=1e-6)
    # The queries are our index.
    np.testing.assert_allclose(found["scores"], flat @ flat.T, rtol=1e-4, atol=1e-4 * float((flat**2).sum(1).max()))


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_bergsons_query_finds_what_our_features_say(name: str, folder: Path) -> None:
    model, tokenizer = load_model(folder / CASES[name]["model"])
    index = np.concatenate(list(read(folder / "ours" / name).values()), axis=1)
    rows = index / np.maximum(np.linalg.norm(index, axis=1, keepdims=True), 1e-12)
    texts = datasets.load_from_disk(str(folder / "data"))["text"]
    with open(folder / f"{name}.csv") as file:
        recorded = list(csv.DictReader(file))
    for text in QUERIES:
        ids = tokenizer(text)["input_ids"]
        batch = collate([Encoded(ids, ids, False)], pad_id=0)
        gradient = torch.cat(list(collector_of(model, CASES[name])(batch)[0].values()), -1)[0].numpy()
        scores = rows @ gradient / np.linalg.norm(gradient)
        best = np.argsort(-scores, kind="stable")[:3]
        said = [row for row in recorded if row["query"] == text and row["direction"].lower() == "top"]
        assert [int(row["result_index"]) for row in said] == best.tolist()
        assert [row["result"] for row in said] == [texts[int(i)] for i in best]
        np.testing.assert_allclose([float(row["score"]) for row in said], scores[best], atol=2e-6)


def test_bergson_scores_a_stores_index_as_we_score_the_store(folder: Path, found: dict[str, np.ndarray]) -> None:
    from less_fast import FeatureStore

    store = FeatureStore(folder / "store")
    scores = influence(store, FeatureStore(folder / "targets"))
    theirs = np.zeros_like(scores.matrix)
    np.put_along_axis(theirs, found["store rows"].T, found["store scores"].T, axis=0)
    assert list(scores.subtasks) == ["x", "y", "z"]
    usable = np.asarray(store.status) == Status.OK
    np.testing.assert_allclose(theirs[usable], scores.matrix[usable], atol=1e-6)
    assert not theirs[~usable].any()


def test_bergson_reads_a_stores_index(folder: Path, found: dict[str, np.ndarray]) -> None:
    from less_fast import FeatureStore

    store = FeatureStore(folder / "store")
    np.testing.assert_array_equal(found["dataset gradients"], store[:])
    np.testing.assert_array_equal(found["store float16"], store[:].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found["store bfloat16"], torch.from_numpy(store[:]).bfloat16().float().numpy())
    said = json.loads((folder / "said.json").read_text())
    assert said["columns"] == {
        "id": store.rows.ids,
        "dataset": store.rows.datasets,
        "subtask": store.rows.subtasks,
        "status": store.status.tolist(),
        "length": store.n_tokens.tolist(),
        "n_labels": store.n_labels.tolist(),
    }
    # Gradients that bergson projects itself are never scored against ours.
    assert "projection_type='less_fast kind=sjlt, dim=16, seed=0, nnz=1', not 'rademacher'" in said["refused"]
    assert torch.load(folder / "store index" / "total_processed.pt").item() == int((store.n_tokens - 1).sum())


def test_packed_batches_give_the_same(folder: Path) -> None:
    data = datasets.load_from_disk(str(folder / "data"))
    batch = collate([Encoded(row["input_ids"], row["labels"], False) for row in data], pad_id=0)
    for name in ("llama", "lora", "whole"):
        model = load(folder, CASES[name])
        padded, losses = collector_of(model, CASES[name], packing="never")(batch)
        packed, same_losses = collector_of(model, CASES[name], packing="always")(batch)
        torch.testing.assert_close(same_losses, losses)
        for module in padded:
            torch.testing.assert_close(packed[module], padded[module], rtol=1e-4, atol=1e-6)


def test_a_module_behind_the_label_gather(folder: Path) -> None:
    """An adapter on the output head sees label positions only."""
    base = causal_lm()
    model = adapted(base, target_modules=["lm_head", "q_proj"]).eval()
    collector = ModuleCollector(model, None, loss_reduction="mean")
    assert any("lm_head.lora_A" in name for name in collector.modules)
    data = datasets.load_from_disk(str(folder / "data"))
    rows = [Encoded([t % 61 for t in row["input_ids"]], [t % 61 for t in row["input_ids"]], False) for row in data]
    batch = collate(rows, pad_id=0)
    found, _ = collector(batch)
    exact = gradients(model, [f"base_model.{name}.weight" for name in collector.modules], batch)
    torch.testing.assert_close(torch.cat(list(found.values()), -1).double(), exact, rtol=1e-3, atol=1e-6)


def test_matrices_follow_the_models_dtype(folder: Path) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    batch = {"input_ids": ids, "labels": ids}
    for dtype in (torch.bfloat16, torch.float64):
        model = load(folder, CASES["llama"])
        collector = collector_of(model, CASES["llama"])
        collector(batch)
        model.to(dtype)
        again, _ = collector(batch)
        new, _ = collector_of(model, CASES["llama"])(batch)
        assert all(torch.equal(again[name], new[name]) for name in new)


def test_targets_and_flags(folder: Path) -> None:
    model = load(folder, CASES["llama"]).train()
    before = [parameter.requires_grad for parameter in model.parameters()]
    collector = ModuleCollector(model, ModuleProjection(2), targets=r"1\.mlp\.down_proj$")
    assert collector.grad_sizes == {"layers.1.mlp.down_proj": 4}
    ids = torch.tensor([[1, 2, 3]])
    found, losses = collector({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert found["layers.1.mlp.down_proj"].shape == (1, 4) and not found["layers.1.mlp.down_proj"].any()
    assert losses.tolist() == [0.0]
    collector({"input_ids": ids, "labels": ids})
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == before


def test_mistakes_are_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    assert "Unknown projection type: 'uniform'" in refusal(lambda: random_matrix("a", 1, 1, "cpu", "uniform"))
    assert "2^31" in refusal(lambda: random_matrix("a", 1, 1 << 31, "cpu", "normal"))
    assert "projection scale is 'no'" in refusal(lambda: ModuleProjection(4, scale="no"))  # type: ignore[arg-type]
    assert "projection dim is 0" in refusal(lambda: ModuleProjection(0))
    model = load(folder, CASES["llama"])
    assert "loss_reduction is 'max'" in refusal(lambda: ModuleCollector(model, None, loss_reduction="max"))  # type: ignore[arg-type]
    collector = ModuleCollector(model, None)
    texts = datasets.Dataset.from_dict({"text": ["a"]})
    assert "no column input_ids; it has text" in refusal(lambda: build_index(collector, texts, tmp_path / "a"))
    ragged = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "labels": [[1, 2], [3, 4]]})
    said = refusal(lambda: build_index(collector, ragged, tmp_path / "a"))
    assert "row 1 of the data has 2 labels; expected 3" in said
    assert not list(tmp_path.iterdir())  # what was begun is gone
    store = folder / "store"
    assert "dtype is 'int8'" in refusal(lambda: write_index(store, tmp_path / "a", dtype="int8"))
    assert "exists already" in refusal(lambda: write_index(store, tmp_path))
    (tmp_path / "a.part").mkdir()
    assert "a.part is there" in refusal(lambda: write_index(store, tmp_path / "a"))
    assert "no rows" in refusal(lambda: write_index(make_store(tmp_path / "none", np.empty((0, 8))), tmp_path / "b"))
