"""What bergson builds, and what it reads in our indexes: run in the tests' folder, with bergson on the path.

The argument is the tests' JSON of jobs. Writes ``theirs/NAME.part``, ``built``, ``found.npz`` and ``said.json``.
"""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import datasets
import numpy
import torch
from bergson import (
    Attributor,
    Builder,
    GradientProcessor,
    IndexConfig,
    PreprocessConfig,
    QueryConfig,
    ScoreConfig,
    collect_gradients,
    load_gradient_dataset,
)
from bergson.collector.projection_matrix import random_matrix
from bergson.data import load_scores
from bergson.query.query_index import query
from bergson.score.score import create_scorer
from bergson.utils.worker_utils import setup_model_and_peft

from less_fast.compat.bergson import ModuleCollector, ModuleProjection

jobs = json.loads(sys.argv[1])
data = datasets.load_from_disk("data")
batches = [[0, 1, 2], [3], [4, 5]]
for name, case in jobs["cases"].items():
    settings = {f"projection_{key}": value for key, value in (case["projection"] or {}).items()}
    reduction = case.get("loss_reduction", "sum")
    settings_of_run = {"model": case["model"], "loss_reduction": reduction, "drop_columns": False, **settings}
    settings_of_run["precision"] = "bf16" if case.get("dtype") == "bfloat16" else "fp32"
    cfg = IndexConfig(run_path=f"theirs/{name}", **settings_of_run)
    model, targets = setup_model_and_peft(cfg)
    collect_gradients(model, data, GradientProcessor(**settings), cfg, batches=batches, target_modules=targets)

model, _ = setup_model_and_peft(IndexConfig(run_path="none", model="llama"))
collector = ModuleCollector(model, ModuleProjection(4))
builder = Builder(data, collector.grad_sizes, torch.float32, PreprocessConfig(), path=Path("built"))
collector.collect(data, builder, token_budget=40, progress=False)
builder.teardown()
mean = Builder(data, collector.grad_sizes, torch.float32, PreprocessConfig(aggregation="mean"))
collector.collect(data, mean, token_budget=40, progress=False)
mean.teardown()

scorer = create_scorer(
    Path("scores"), data, ScoreConfig(query_path="ours/llama"), PreprocessConfig(), torch.device("cpu"), torch.float32
)
collector.collect(data, scorer, token_budget=40, progress=False)
scorer.writer.flush()
GradientProcessor(projection_dim=4).check_saved_projection("ours/llama", "The query")  # as `bergson score` does

found = {"mean": mean.grad_buffer, "scores": load_scores(Path("scores"))[:]}
for i, (identifier, m, n, kind) in enumerate(jobs["matrices"]):
    found[f"matrix {i}"] = random_matrix(identifier, m, n, "cpu", kind).numpy()
    found[f"narrow {i}"] = random_matrix(identifier, m, n, "cpu", kind, torch.bfloat16).float().numpy()

attributor = Attributor("store index", unit_norm=True)
queries = {"gradients": torch.from_numpy(numpy.load("queries.npy"))}
found["store scores"], found["store rows"] = (x.numpy() for x in attributor.search(queries, None))
for dtype in ("float16", "bfloat16"):
    grads = Attributor(f"store index {dtype}").grads
    found[f"store {dtype}"] = grads["gradients"].numpy()
dataset = load_gradient_dataset(Path("store index"))
found["dataset gradients"] = numpy.asarray(dataset["gradients"], numpy.float32)
said = {"columns": {name: list(dataset[name]) for name in dataset.column_names if name != "gradients"}}
run = GradientProcessor(projection_dim=queries["gradients"].shape[1], projection_target="global")
try:
    run.check_saved_projection("store index", "The query")
except ValueError as error:
    said["refused"] = str(error)

for name in jobs["queried"]:
    lines = iter([*jobs["queries"], "exit"])
    builtins.input = lambda prompt, lines=lines: next(lines)
    query(QueryConfig(index=f"ours/{name}", top_k=3, record=f"{name}.csv"))
numpy.savez("found.npz", **found)
Path("said.json").write_text(json.dumps(said))
