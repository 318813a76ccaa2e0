"""``ExtractJob``: what ``less-fast extract`` is asked for, as a value that any process can carry out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from less_fast.paths import local_copy, to_path
from less_fast.projection import Projection
from less_fast.workers import Worker

if TYPE_CHECKING:
    from less_fast.data import Examples
    from less_fast.extraction import Extraction
    from less_fast.store import FeatureStore


@dataclass(frozen=True)
class ExtractJob:
    """Stores to make, named by what lies on disks: it holds no model and no examples, and it pickles.

    Parameters
    ----------
    model, adapter, device, device_map, quantization : as for :func:`~less_fast.load_model`; folders may be URLs.
    data : files (or URLs) of examples, joined in order; ``limit``: take only the first so many.
    out : the store's folder or URL. Several preconditions or projections get stores in it: ``out/adam-dim8192``, ….
    optimizer : a checkpoint (or file) with Adam's state; default the adapter's folder. ``rule``: ``less`` or ``torch``.
    preconditions : ``adam``, ``sgd`` or ``sign``.
    shard_size : examples per shard.
    model_dtype : of the model's and the adapter's weights.
    settings : other keyword arguments of :func:`~less_fast.extraction.prepare`; ``dtype`` is that of the features.
    """

    model: str
    data: tuple[str, ...]
    out: str
    adapter: str | None = None
    optimizer: str | None = None
    rule: str = "less"
    preconditions: tuple[str, ...] = ("sgd",)
    projections: tuple[Projection, ...] = (Projection(),)
    limit: int | None = None
    shard_size: int = 1024
    model_dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    quantization: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stores(self) -> dict[str, tuple[str, Projection]]:
        """The folder of every store, with what is made there: precondition and projection."""
        made = [(name, projection) for name in self.preconditions for projection in self.projections]
        if len(made) == 1:
            return {self.out: made[0]}
        out = to_path(self.out)
        return {str(out / f"{name}-dim{projection.dim}"): (name, projection) for name, projection in made}

    def examples(self) -> Examples:
        """Read the files of examples."""
        from less_fast.data import load_examples

        return load_examples(list(self.data), limit=self.limit)

    def prepare(self) -> Extraction:
        """Load all that the shards are made of and check it; nothing is written yet."""
        from less_fast.extraction import prepare

        return prepare(**self._arguments())

    def run(
        self, *, shared: bool | None = None, shard_range: tuple[int, int] | None = None, progress: bool = True
    ) -> dict[str, FeatureStore]:
        """Make the stores in this process; the arguments are those of :func:`~less_fast.extract_many`."""
        from less_fast.extraction import extract_many

        made = extract_many(**self._arguments(), shared=shared, shard_range=shard_range, progress=progress)
        return {str(path): store for path, store in made.items()}

    def _arguments(self) -> dict[str, Any]:
        """Those of ``prepare``, loaded."""
        from less_fast.features import Output
        from less_fast.model.load import load_model
        from less_fast.optim import AdamState

        examples = self.examples()
        state: dict[str, Any] = {name: name for name in self.preconditions}
        with ExitStack() as stack:
            named = {name for name in (self.model, self.adapter, self.optimizer) if name is not None}
            local = {name: stack.enter_context(local_copy(name)) for name in named}
            model, tokenizer = load_model(
                local[self.model],
                None if self.adapter is None else local[self.adapter],
                dtype=self.model_dtype,
                device=Worker.from_environment().device(self.device) if self.device_map is None else self.device,
                quantization=self.quantization,
                device_map=self.device_map,
            )
            if "adam" in state:
                checkpoint = local[self.optimizer or self.adapter or self.model]
                state["adam"] = AdamState.from_checkpoint(checkpoint, model, self.rule)
        return {
            "model": model,
            "dataset": examples,
            "outputs": {path: Output(projection, state[name]) for path, (name, projection) in self.stores.items()},
            "tokenizer": tokenizer,
            "shard_size": self.shard_size,
            **self.settings,
        }
