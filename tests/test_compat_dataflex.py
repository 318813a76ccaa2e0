"""The DataFlex selector chooses what exact arithmetic does, touches nothing else, and is built by DataFlex itself."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.live_training import adamw, exact_features, moments, step
from support.models import adapted, batch, causal_lm
from support.upstream import packages
from torch import Tensor

from less_fast import LessFastError, Projection
from less_fast.compat.backend import LessFastBackend
from less_fast.compat.dataflex import LessSelector, register

N, M, DIM = 24, 5, 256


def items(n: int, seed: int) -> list[dict[str, list[int]]]:
    """Tokenised examples of several lengths."""
    rows = batch(tuple(5 + 3 * i % 14 for i in range(n)), seed=seed)
    lengths = rows["attention_mask"].sum(1).tolist()
    return [{name: rows[name][i, :t].tolist() for name in rows} for i, t in enumerate(lengths)]


def collator(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded on the left, as DataFlex's host does for some models."""
    width = max(len(item["input_ids"]) for item in features)
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([[value] * (width - len(item[name])) + item[name] for item in features])
        for name, value in padding.items()
    }


@pytest.fixture
def training() -> tuple[Any, torch.optim.AdamW]:
    model = adapted(causal_lm())
    optimizer = adamw(model)
    for seed in range(2):
        step(model, optimizer, batch(seed=100 + seed))
    return model, optimizer


def selector(**changes: Any) -> LessSelector:
    given = {"dataset": items(N, 1), "eval_dataset": items(M, 2), "data_collator": collator, "proj_dim": DIM}
    return LessSelector(**{**given, "save_interval": 7, **changes})


def exact_scores(model: Any, optimizer: Any, chooser: LessSelector) -> np.ndarray:
    """(N,) float64: mean cosine with the targets."""
    layout = LessFastBackend(model, chooser.projection).layout()
    state = moments(model, optimizer) if chooser.gradient_type == "adam" else None
    train = exact_features(model, layout, collator(chooser.dataset), chooser.projection, state)
    target = exact_features(model, layout, collator(chooser.eval_dataset), chooser.projection)
    train, target = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, target))
    return (train @ target.T).mean(1)


@pytest.mark.parametrize("proj_type", ["srht", "rademacher"])
@pytest.mark.parametrize("gradient_type", ["adam", "sgd"])
def test_selections_are_those_of_exact_arithmetic(
    training: Any, gradient_type: str, proj_type: str, tmp_path: Path
) -> None:
    model, optimizer = training
    chooser = selector(gradient_type=gradient_type, proj_type=proj_type, cache_dir=tmp_path / "cache", seed=3)
    for number in range(2):
        exact = exact_scores(model, optimizer, chooser)
        found = chooser.select(model, step_id=number, num_samples=9, optimizer_state=optimizer.state, tokenizer=None)
        assert found == np.argsort(-exact)[:9].tolist()
        record = json.loads((tmp_path / f"cache/step_{number}.json").read_text())
        assert record["indices"] == found
        np.testing.assert_allclose(record["metric"]["mean_cosine"], exact[found], atol=1e-4)
        step(model, optimizer, batch(seed=200))  # the next selection is of another state


def test_selecting_changes_nothing_and_repeats(training: Any) -> None:
    model, optimizer = training
    model(**batch()).loss.backward()
    before = copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state())
    )
    flags = [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]]
    size = len(optimizer.state)
    first = selector().select(model, 1, 6, optimizer_state=optimizer)
    assert selector(save_interval=100).select(model, 1, 6, optimizer_state=optimizer.state) == first
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert flags == [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]]
    assert len(optimizer.state) == size


def test_unusable_examples_are_never_selected(training: Any) -> None:
    model, optimizer = training
    dataset, target = items(N, 1), items(M, 2)
    for index in (0, 4):
        dataset[index]["labels"] = [-100] * len(dataset[index]["labels"])
    target[3]["labels"] = [-100] * len(target[3]["labels"])
    chooser = selector(dataset=dataset, eval_dataset=target)
    with pytest.warns(UserWarning, match=f"{N} rows asked for, but only {N - 2} of {N} are valid"):
        found = chooser.select(model, 1, N, optimizer_state=optimizer)
    assert sorted(found) == [i for i in range(N) if i not in (0, 4)]
    without = selector(dataset=dataset, eval_dataset=[item for i, item in enumerate(target) if i != 3])
    assert without.select(model, 1, 5, optimizer_state=optimizer) == found[:5]


def test_a_pool_is_all_that_is_selected_from(training: Any) -> None:
    model, optimizer = training
    chooser = selector()
    order = chooser.select(model, 1, N, optimizer_state=optimizer)
    pool = [20, 3, 11, 7]
    chooser.set_candidate_pool(pool)
    assert chooser.select(model, 1, 3, optimizer_state=optimizer) == [i for i in order if i in pool][:3]
    chooser.set_candidate_pool(None)
    assert chooser.select(model, 1, N, optimizer_state=optimizer) == order


def test_refusals_say_what_to_do(training: Any) -> None:
    model, optimizer = training
    chooser = selector()
    with pytest.raises(LessFastError, match="no optimizer_state, which gradient_type 'adam' needs"):
        chooser.select(model, 1, 3)
    with pytest.raises(LessFastError, match=r"state is empty.*after its first step"):
        chooser.select(model, 1, 3, optimizer_state=adamw(model).state)
    masked = [{**item, "labels": [-100] * len(item["labels"])} for item in items(M, 2)]
    with pytest.raises(LessFastError, match=f"none of {M} target examples has a usable gradient"):
        selector(eval_dataset=masked).select(model, 1, 3, optimizer_state=optimizer)
    with pytest.raises(LessFastError, match="eval_dataset is missing or empty"):
        selector(eval_dataset=None)
    with pytest.raises(LessFastError, match="gradient_type is 'lion'"):
        selector(gradient_type="lion")
    with pytest.raises(LessFastError, match="save_interval is 0"):
        selector(save_interval=0)
    several = SimpleNamespace(num_processes=2)
    with pytest.raises(LessFastError, match="runs in one process, and there are 2"):
        selector(accelerator=several).select(model, 1, 3, optimizer_state=optimizer)
    sharded = SimpleNamespace(num_processes=1, state=SimpleNamespace(deepspeed_plugin=object()))
    with pytest.raises(LessFastError, match="DeepSpeed"):
        selector(accelerator=sharded).select(model, 1, 3, optimizer_state=optimizer)
    with pytest.raises(LessFastError, match="data_collator is None"):
        selector(data_collator=None)
    with pytest.raises(LessFastError, match="nothing to select from: the dataset is empty"):
        selector(dataset=[]).select(model, 1, 3, optimizer_state=optimizer)
    nobody = selector()
    nobody.set_candidate_pool([])
    with pytest.raises(LessFastError, match="nothing to select from: the candidate pool is empty"):
        nobody.select(model, 1, 3, optimizer_state=optimizer)
    with pytest.raises(LessFastError, match="30 examples are to be drawn without replacement"):
        chooser.warmup(30, replacement=False)


def test_the_widest_block_that_divides_the_dimension_is_taken() -> None:
    assert selector(proj_dim=96).projection == Projection("srht", 96, 42, block=32)
    assert selector(target_dataset=items(M, 2), eval_dataset=None, proj_dim=8192).projection.block == 64
    with pytest.raises(LessFastError, match="cannot mix dim = 1001"):
        selector(proj_dim=1001)
    assert selector(proj_dim=1001, proj_type="rademacher").projection == Projection("rademacher", 1001, 42)


def test_dataflex_names_the_normal_distribution_otherwise() -> None:
    assert selector(proj_type="normal", proj_dim=100).projection == Projection("gaussian", 100, 42)


def test_of_a_batch_only_what_the_model_reads_is_taken(training: Any) -> None:
    model, optimizer = training

    def wider(name: str) -> Any:
        return lambda features: {**(made := collator(features)), name: torch.zeros_like(made["input_ids"])}

    expected = selector().select(model, 1, 6, optimizer_state=optimizer)
    unread = selector(data_collator=wider("token_type_ids"))
    assert unread.select(model, 1, 6, optimizer_state=optimizer) == expected
    with pytest.raises(LessFastError, match="the batch has position_ids"):
        selector(data_collator=wider("position_ids")).select(model, 1, 6, optimizer_state=optimizer)
    gpt2 = adapted(causal_lm("gpt2"))  # adds the embeddings of these
    with pytest.raises(LessFastError, match="the batch has token_type_ids"):
        selector(data_collator=wider("token_type_ids"), gradient_type="sgd").select(gpt2, 1, 6)


def test_registering_without_dataflex_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dataflex", None)
    with pytest.raises(LessFastError, match=r"^DataFlex.* cannot be imported .*pip install dataflex$"):
        register()


IN_DATAFLEX = """
import json, pickle, sys
import torch
from accelerate import Accelerator
from dataflex.core.registry import REGISTRY
from dataflex.train.selector.base_selector import Selector

sys.path.insert(0, sys.argv[1])
import test_compat_dataflex as case
from less_fast.compat.dataflex import register

class Plain(Selector):
    def select(self, *args, **kwargs): ...

register("ours")
model = case.adapted(case.causal_lm())
optimizer = case.adamw(model)
case.step(model, optimizer, case.batch(seed=100))
case.step(model, optimizer, case.batch(seed=101))
accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, optimizer)
runtime = {"dataset": case.items(case.N, 1), "eval_dataset": case.items(case.M, 2), "accelerator": accelerator,
           "data_collator": case.collator}
cfg = {"cache_dir": sys.argv[2] + "/ours", "gradient_type": "adam", "proj_dim": case.DIM, "seed": 123,
       "save_interval": 16}
chosen = REGISTRY.build("selector", "ours", runtime=runtime, cfg=cfg)
selected = chosen.select(model=model, step_id=4, num_samples=6, optimizer_state=optimizer.state, scheduler_state={},
                         current_update_times=1, update_times=1, tokenizer=None)
plain = Plain(runtime["dataset"], accelerator, None, None)
plain.seed = 123
drawn = [[s.warmup(7, replacement=r) for r in (True, False)] for s in (plain, chosen)]
from dataflex.utils.selector_io import load_cached_selection
read, metric = load_cached_selection(sys.argv[2] + "/ours/step_4.json")

smooth = case.adapted(case.causal_lm(attention_dropout=0.0), lora_dropout=0.0)
cosines = []
for name, kind in (("less", {}), ("ours", {"proj_type": "rademacher"})):
    folder = sys.argv[2] + "/sgd-" + name
    cfg = {**cfg, "cache_dir": folder, "gradient_type": "sgd", "proj_dim": 2048, **kind}
    REGISTRY.build("selector", name, runtime=runtime, cfg=cfg).select(model=smooth, step_id=1, num_samples=case.N)
    indices, metric_of_all = load_cached_selection(folder + "/step_1.json")
    (values,) = metric_of_all.values()
    cosines.append([value for _, value in sorted(zip(indices, values))])
print("RESULT", json.dumps({"selected": selected, "drawn": drawn, "read": read, "n": len(metric["mean_cosine"]),
                            "cosines": cosines}))
"""


def test_dataflex_builds_and_asks_it(training: Any, tmp_path: Path) -> None:
    path, here = [packages("dataflex==1.1.0"), packages("traker==0.3.2")], Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", IN_DATAFLEX, str(here), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, here]))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout.partition("RESULT ")[2].partition("\n")[0])
    model, optimizer = training
    chooser = selector(seed=123, save_interval=16)
    assert result["selected"] == chooser.select(model, 4, 6, optimizer_state=optimizer)
    assert result["read"] == result["selected"] and result["n"] == 6
    theirs, ours = result["drawn"]
    assert ours == theirs
    # Its own LESS, on plain gradients (of Adam's updates it has another): two projections of the same cosines.
    theirs, ours = np.array(result["cosines"])
    assert np.corrcoef(theirs, ours)[0, 1] > 0.98 and np.abs(theirs - ours).max() < 0.05
