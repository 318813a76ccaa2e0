"""How much of the exact cosines, ranking and selection is left after each projection, dimension and store dtype."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quality_case import Exact, Float32, Groups, Workspace, as_tensor, subtask_means, top, unit
from torch import Tensor

from less_fast.checkpoints import Checkpoint
from less_fast.data import collate, encode_all, load_examples
from less_fast.features import MultiFeatureExtractor, Output
from less_fast.layout import ParameterLayout
from less_fast.model import load_model
from less_fast.ops.accumulate import accumulate
from less_fast.ops.reduce import reduce_features
from less_fast.optim import AdamState
from less_fast.projection import Projection
from less_fast.store.codec import CODECS, Array, encode_signs
from less_fast.store.rotation import rotate
from less_fast.store.shard import encode_shard

# What the pool's rows and the targets' are stored in. As in `less-fast run`, targets of int8 and 1bit stay float32.
STORES = (
    ("float32", "float32"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("int8", "float32"),
    ("1bit", "float32"),
    ("1bit", "1bit"),
)
# Positions of the model's width (as parts of it) and factors: what outlier activations do to the entries behind them.
OUTLIERS = ((0.2, 60.0), (0.55, 40.0))
METRICS = ("cosine_rms", "rank_correlation", "top_overlap")

Measures = dict[str, dict[str, Any]]


def sketch(rows: Tensor, layout: ParameterLayout, projection: Projection) -> Tensor:
    """Pi applied to gradients (n, P) that exist, matrix by matrix, as extraction applies it to those in the making."""
    features = torch.zeros(len(rows), projection.dim)
    for parameter, base in zip(layout.parameters, layout.run_bases(projection.block)):
        entries = rows[:, parameter.offset : parameter.offset + parameter.size]
        matrix = entries.unflatten(1, (parameter.rows, parameter.cols))
        if not parameter.short_is_rows:
            matrix = matrix.transpose(1, 2).contiguous()
        accumulate(features, matrix, parameter, base, projection)
    return features


def check(
    space: Workspace, checkpoint: Checkpoint, exact: Exact, layout: ParameterLayout, kinds: Sequence[Projection]
) -> None:
    """The sketch of exact features must be what extraction gives for the same examples, for every kind."""
    model, tokenizer = load_model(space.case.model, checkpoint.path, device="cpu")
    adam = AdamState.from_checkpoint(checkpoint.path, model)
    some = range(min(8, len(exact.rows)))
    examples = load_examples(space.case.pool).take(exact.rows[some])
    batch = collate(encode_all(examples, tokenizer, max_length=space.case.max_length), 0)
    small = [replace(kind, dim=space.case.block_dim) for kind in kinds]
    extracted = MultiFeatureExtractor(model, [Output(kind, adam) for kind in small])(batch).features
    for kind, expected in zip(small, extracted):
        error = ((sketch(as_tensor(exact.pool[some]), layout, kind) - expected).norm() / expected.norm()).item()
        if not error < 1e-5:
            raise SystemExit(f"{kind}: the sketch differs from extraction by {error:.1e}; not measuring another thing")


@dataclass(frozen=True)
class Reference:
    """What the exact features say: cosines (N, Q), and the final scores of each task."""

    cosines: Float32
    scores: dict[str, Float32]
    groups: Groups

    @classmethod
    def of(cls, pool: Float32, targets: Float32, groups: Groups) -> Reference:
        cosines = unit(pool) @ unit(targets).T
        return cls(cosines, final_scores(cosines, groups), groups)


def final_scores(cosines: Float32, groups: Groups) -> dict[str, Float32]:
    """LESS's score at one checkpoint: the mean over each subtask, and the best of a task's subtasks."""
    return {task: means.max(axis=1) for task, means in subtask_means(cosines, groups).items()}


def stored(rows: Float32, dtype: str) -> tuple[dict[str, Array], Float32]:
    """What a shard of this dtype holds for the rows, and its numbers as scoring multiplies them: float32 (n, K).

    Those are the unit rows as they are read; of 1bit, what they have beyond the shard's center, rotated still.
    """
    codec = CODECS[dtype]
    tensors = encode_shard(codec, rows, np.zeros(len(rows), np.uint8))
    norms = np.ones_like(tensors["norms"]) if codec.rotated else tensors["norms"]
    scale = tensors["scale"] if codec.scaled else np.ones_like(norms)
    factor = np.divide(scale, norms, out=np.zeros_like(norms), where=norms > 0)
    return tensors, codec.to_float(tensors["features"], rows.shape[1]) * factor[:, None]


def stored_cosines(pool: Float32, targets: Float32, dtype: str, target_dtype: str) -> Float32:
    """The cosines (N, Q) as scoring computes them from a pool of one shard and targets of these dtypes."""
    tensors, rows = stored(pool, dtype)
    if not CODECS[dtype].rotated:
        return rows @ stored(targets, target_dtype)[1].T
    queries = unit(targets)
    common = np.where(tensors["norms"][:, None] > 0, tensors["center"] @ queries.T, np.float32(0))
    if target_dtype == "1bit":
        codes, scale = encode_signs(queries)
        return common + rows @ (CODECS["1bit"].to_float(codes, pool.shape[1]) * scale[:, None]).T
    return common + rows @ rotate(queries).T


def measure(pool: Float32, targets: Float32, reference: Reference, n: int) -> Measures:
    """Store dtype x target dtype -> cosine_rms; by task, rank_correlation and top_overlap, that of the best n rows."""
    found = {}
    for dtype, target_dtype in STORES:
        cosines = stored_cosines(pool, targets, dtype, target_dtype)
        scores = final_scores(cosines, reference.groups)
        found[f"{dtype} x {target_dtype}"] = {
            "cosine_rms": float(np.sqrt(np.mean((cosines - reference.cosines) ** 2, dtype=np.float64))),
            "rank_correlation": {t: rank_correlation(scores[t], reference.scores[t]) for t in scores},
            "top_overlap": {t: len(np.intersect1d(top(scores[t], n), top(reference.scores[t], n))) / n for t in scores},
        }
    return found


def rank_correlation(a: Float32, b: Float32) -> float:
    """Spearman's, equal values counting as ordered by row."""
    apart = np.subtract(*(np.argsort(np.argsort(x, kind="stable")) for x in (a, b))).astype(np.float64)
    return 1 - 6 * float(apart @ apart) / (len(a) * (len(a) ** 2 - 1))


@dataclass(frozen=True)
class Outliers:
    """Entries that planted columns of the model's width scale: ``index`` (M,) among P, ``factor`` (M,) each."""

    index: NDArray[np.int64]
    factor: Float32

    @classmethod
    def of(cls, layout: ParameterLayout) -> Outliers:
        index, factor = [], []
        for parameter in layout.parameters:
            if not parameter.short_is_rows:
                continue  # lora_B: its inputs are the adapter's own
            for place, scale in OUTLIERS:
                column = int(place * parameter.cols)
                index += [parameter.offset + row * parameter.cols + column for row in range(parameter.rows)]
                factor += [scale] * parameter.rows
        return cls(np.array(index), np.array(factor, np.float32))

    def plant(self, rows: Float32) -> Float32:
        """A copy of rows (n, P) with the entries scaled."""
        planted = rows.copy()
        planted[:, self.index] *= self.factor
        return planted

    def energy(self, planted: Float32) -> float:
        """The share of a row's squared norm that the scaled entries have, on average."""
        return float(np.mean((unit(planted)[:, self.index] ** 2).sum(axis=1)))

    def basis(self, size: int) -> Float32:
        """The unit vectors of the scaled entries, (M, P)."""
        basis = np.zeros((len(self.index), size), np.float32)
        basis[np.arange(len(basis)), self.index] = 1
        return basis


def run(space: Workspace, n_seeds: int) -> Iterator[dict[str, Any]]:
    """A result of every kind, K, store dtype and kind of gradients, over the seeds."""
    case = space.case
    checkpoint = space.checkpoints()[-1]
    exact, layout = space.exact(checkpoint), space.layout(checkpoint)
    largest = max(case.dims)
    kinds = [Projection(kind, largest) for kind in ("srht", "sjlt", "rademacher", "gaussian")]
    jobs = [(kind, case.dims) for kind in kinds]
    jobs += [(Projection("srht", case.block_dim, block=block), (case.block_dim,)) for block in case.blocks]
    check(space, checkpoint, exact, layout, [kind for kind, _ in jobs])

    n, n_selected, outliers = len(exact.pool), space.n_selected(), Outliers.of(layout)
    references, energy = {}, None
    for name in ("real", "outliers"):
        pool, targets = exact.pool, exact.targets
        if name == "outliers":
            pool, targets = outliers.plant(pool), outliers.plant(targets)
            energy = outliers.energy(pool)
        reference = references[name] = Reference.of(pool, targets, exact.groups)
        made = space.result(f"sketch/identity-{name}", partial(measure, pool, targets, reference, n_selected))
        yield from summaries(Projection("identity", layout.size), name, [made], energy)

    # A sketch is linear: that of planted rows is that of the rows, and of what was added to them. For that the columns
    # of Pi at those entries are needed, which are the sketches of unit vectors.
    everything = np.concatenate([exact.pool, exact.targets, outliers.basis(layout.size)])
    planted = len(everything) - len(outliers.index)
    added = everything[:planted, outliers.index] * (outliers.factor - 1)

    def measured(projection: Projection, dims: Sequence[int]) -> dict[str, dict[str, Measures]]:
        whole = sketch(torch.from_numpy(everything), layout, projection)
        found: dict[str, dict[str, Measures]] = {}
        for dim in dims:
            features = reduce_features(whole, projection, replace(projection, dim=dim)).contiguous().numpy()
            plain, columns = features[:planted], features[planted:]
            found[str(dim)] = {
                name: measure(rows[:n], rows[n:], references[name], n_selected)
                for name, rows in (("real", plain), ("outliers", plain + added @ columns))
            }
        return found

    for kind, dims in jobs:
        by_seed = []
        for seed in range(n_seeds):
            projection = replace(kind, seed=seed)
            name = "-".join(str(value) for value in projection.to_dict().values())
            by_seed.append(space.result(f"sketch/{name}", partial(measured, projection, dims)))
        for dim in dims:
            for name in references:
                found = [result[str(dim)][name] for result in by_seed]
                yield from summaries(replace(kind, dim=dim), name, found, energy)


def summaries(
    projection: Projection, gradients: str, by_seed: Sequence[Measures], energy: float | None
) -> Iterator[dict[str, Any]]:
    """One result per store dtype: mean over seeds and tasks, standard deviation over seeds, and each task's mean."""
    for stores in by_seed[0]:
        dtype, _, target_dtype = stores.partition(" x ")
        result: dict[str, Any] = {
            "gradients": gradients,
            "outlier_energy": energy if gradients == "outliers" else None,
            "kind": projection.kind,
            "block": projection.block if projection.kind == "srht" else None,
            "k": projection.dim,
            "dtype": dtype,
            "target_dtype": target_dtype,
            "seeds": len(by_seed),
        }
        for metric in METRICS:
            values = [found[stores][metric] for found in by_seed]
            overall = [statistics.mean(value.values()) if isinstance(value, Mapping) else value for value in values]
            result[metric] = statistics.mean(overall)
            result[f"{metric}_sd"] = statistics.stdev(overall) if len(overall) > 1 else None
            if isinstance(values[0], Mapping):
                result[f"{metric}_by_task"] = {t: statistics.mean(v[t] for v in values) for t in values[0]}
        yield result
