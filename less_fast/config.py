"""``RunConfig``: every setting of a run with its default and its meaning, read from and written to YAML or TOML."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from less_fast.errors import LessFastError
from less_fast.projection import Projection

_SUFFIX = re.compile(r"(\.jsonl|\.jsonlines|\.json-lines|\.ndjson|\.json|\.parquet|\.pq)?(\.gz)?$", re.IGNORECASE)
_TASK_NAME = re.compile(r"[\w][\w.-]*")
_PATHS = ("model", "out", "checkpoints", "groups")
# First setting of each section -> its heading, in the help and in written files.
_SECTIONS = {
    "model": "Input and output",
    "checkpoints": "Checkpoints",
    "warmup_fraction": "Warm-up",
    "template": "Features",
    "aggregate": "Scores and selection",
    "device": "Machine",
}


def _field(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run. Raises LessFastError, naming the setting, where a value has the wrong type.

    ``targets`` may be given as a list of files: each file's stem is then its task's name. Relative paths start at the
    current directory. What each setting means is in its field's metadata, which ``less-fast run --help`` shows.
    """

    model: str = _field("", "Folder (or hub name) of the Hugging Face causal language model.")
    train: tuple[str, ...] = _field((), "Files of the pool that is selected from.")
    targets: dict[str, str] = field(
        default_factory=dict, metadata={"meaning": "Task name -> file of examples that say what to select for."}
    )
    out: str = _field("", "Folder that everything the run makes goes to.")

    checkpoints: str | None = _field(None, "Folder of a finished training run to use; not set: warm up here.")
    checkpoint_weights: tuple[float, ...] | None = _field(
        None, "Weight of each checkpoint; not set: the mean learning rate of the epoch it ends, as in LESS."
    )
    modules: str | None = _field(
        None, "Regular expression of the Linear layers to take gradients of; not set: the LoRA matrices."
    )

    warmup_fraction: float = _field(0.05, "Share of the pool that warm-up trains on.")
    warmup_epochs: int = _field(4, "Epochs of warm-up; each ends with a checkpoint.")
    warmup_learning_rate: float = _field(2e-5, "Peak learning rate of warm-up.")
    warmup_batch_size: int = _field(128, "Examples per optimizer step of warm-up.")
    warmup_micro_batch_size: int = _field(1, "Examples that a device computes at once in warm-up.")
    warmup_seed: int = _field(0, "Seed of the adapter's first values, the order of examples and the dropout.")
    warmup_subset_seed: int = _field(42, "Seed that the warm-up examples are drawn with.")
    lora_rank: int = _field(128, "Rank of the LoRA adapter.")
    lora_alpha: int = _field(512, "Alpha of the LoRA adapter.")
    lora_dropout: float = _field(0.1, "Dropout of the LoRA adapter in warm-up; there is none in extraction.")
    lora_modules: tuple[str, ...] | Literal["auto"] = _field(
        "auto", "Names of the layers that get an adapter; auto: the attention projections."
    )

    template: Literal["tulu", "chat", "raw"] = _field(
        "tulu", "How an example becomes text: as in LESS, by the tokenizer's own chat template, or as it is."
    )
    max_length: int = _field(2048, "Tokens that an example is cut to.")
    projection: Literal["srht", "sjlt", "rademacher", "gaussian", "identity"] = _field(
        "srht", "Kind of random projection."
    )
    dim: int = _field(8192, "Features per example, K.")
    seed: int = _field(0, "Seed of the projection.")
    block: int = _field(64, "Length of the runs that srht mixes; a power of two that divides dim.")
    nnz: int = _field(1, "Non-zeros per column of sjlt.")
    adam_rule: Literal["less", "torch"] = _field("less", "Adam's update as in the code of LESS, or as in torch.optim.")

    store_dtype: Literal["float32", "float16", "bfloat16", "int8", "1bit"] = _field(
        "float32", "Type that features are stored in; int8 and 1bit are for the pool, its targets are then float32."
    )
    token_budget: int | Literal["auto"] = _field(
        "auto", "Tokens per batch, padding included; auto: what fits the device."
    )
    shard_size: int = _field(1024, "Examples per shard, the unit of work that a killed run loses at most.")
    aggregate: Literal["max", "mean"] = _field("max", "How the scores of a task's subtasks become one.")
    fraction: float = _field(0.05, "Share of the pool to select for each task.")
    n: int | None = _field(None, "Number of examples to select for each task; where set, fraction is not used.")
    groups: str | None = _field(None, "JSON file, dataset name -> group; the report is then by group.")
    scores_csv: bool = _field(False, "Write the scores as csv too.")
    device: str = _field("auto", "auto, cpu, cuda or cuda:N.")
    dtype: Literal["float32", "bfloat16", "float16"] = _field(
        "float32", "Type of the model's and the adapter's weights."
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = _field(
        None, "Spread the model's layers over all devices, the host and the disk in extraction; device stays auto."
    )
    quantization: Literal["4bit", "8bit"] | None = _field(
        None, "Bits of the base model's linear layers in extraction, by bitsandbytes; not set: dtype."
    )
    checkpoint_activations: bool = _field(
        False, "Keep the layers' inputs alone in extraction and compute the rest twice: less memory, more time."
    )
    backend: Literal["auto", "triton", "cuda", "cpu", "reference"] = _field("auto", "What computes the projection.")
    packing: Literal["auto", "always", "never"] = _field(
        "auto", "Whether batches are computed without padding; auto: on CUDA, where attention has a kernel for it."
    )
    compile_model: bool = _field(False, "Run torch.compile on the parts of the model without adapters in extraction.")

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            value = _normal(name, getattr(self, name), hint)
            if not _fits(value, hint):
                raise LessFastError(f"setting {name} is {value!r}; expected {_words(hint)}")
            object.__setattr__(self, name, value)
        _check_ranges(self)
        for task in self.targets:
            if not _TASK_NAME.fullmatch(task):
                raise LessFastError(f"target name {task!r} cannot name a file; use letters, digits, '.', '_' and '-'")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "the settings") -> RunConfig:
        """From plain values; an unknown name raises LessFastError with the nearest valid one."""
        names = [known.name for known in fields(cls)]
        for name in settings:
            if name not in names:
                (nearest,) = get_close_matches(str(name), names, n=1, cutoff=0)
                raise LessFastError(f"{where}: unknown setting {str(name)!r}; did you mean {nearest!r}?")
        try:
            return cls(**settings)
        except LessFastError as error:
            raise LessFastError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a .yaml, .yml or .toml file; settings that it does not name keep their defaults."""
        return cls.from_dict(read_settings(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values: lists instead of tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def save(self, path: str | Path) -> None:
        """Write every setting with its meaning to a .yaml, .yml or .toml file, whole or not at all."""
        from less_fast.store.files import atomic_file, failed_write

        path = Path(path)
        toml = _is_toml(path)
        lines, values = [], self.to_dict()
        for setting in settings():
            if setting.name in _SECTIONS:
                lines.append(f"\n### {setting.section}\n")
            value = values[setting.name]
            line = _toml_line(setting.name, value) if toml else _yaml_line(setting.name, value)
            lines.append(f"# {setting.meaning}\n{line}\n")
        text = "".join(lines).lstrip()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise failed_write(path, error, "choose another place") from error

    def resolved(self) -> RunConfig:
        """The same with the absolute paths of what is there, so that it holds from every directory."""
        changes: dict[str, Any] = {name: _absolute(getattr(self, name)) for name in _PATHS}
        changes["out"] = str(Path(self.out).expanduser().absolute())
        changes["train"] = tuple(map(_absolute, self.train))
        changes["targets"] = {task: _absolute(file) for task, file in self.targets.items()}
        return replace(self, **changes)

    def require_complete(self) -> None:
        """Raise LessFastError where a setting that has no useful default is not given."""
        for name in ("model", "train", "targets", "out"):
            if not getattr(self, name):
                flag = "--target" if name == "targets" else f"--{name}"
                raise LessFastError(f"setting {name} is missing; give {flag}, or name it in the config file")


def read_settings(path: str | Path) -> dict[str, Any]:
    """The content of a .yaml, .yml or .toml file; raises LessFastError where it can't be read, with the line."""
    import yaml

    path = Path(path)
    toml = _is_toml(path)
    try:
        text = path.read_text(encoding="utf-8")
        settings = _parse_toml(text) if toml else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise LessFastError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise LessFastError(
            f"{path}: not valid {'TOML' if toml else 'YAML'} ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(settings, dict | None):
        raise LessFastError(f"{path}: expected 'setting: value' lines, found {type(settings).__name__}")
    return settings or {}


def task_name(file: str) -> str:
    """The name of a task whose file is given without one: the file's stem."""
    return _SUFFIX.sub("", Path(file).name)


def _parse_toml(text: str) -> dict[str, Any]:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return dict(tomllib.loads(text))


def _is_toml(path: Path) -> bool:
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise LessFastError(f"{path}: expected a name that ends in .yaml, .yml or .toml")
    return path.suffix == ".toml"


def _yaml_line(name: str, value: Any) -> str:
    import yaml

    return yaml.safe_dump({name: value}, allow_unicode=True, sort_keys=False, width=1000).rstrip("\n")


def _toml_line(name: str, value: Any) -> str:
    # TOML has no null: a setting that is not set stands there as a comment.
    return f"# {name} =" if value is None else f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(RunConfig)


class Setting(NamedTuple):
    """One field of RunConfig: its name, type, meaning and section."""

    name: str
    type: Any
    meaning: str
    section: str

    @property
    def is_list(self) -> bool:
        """Whether it may be given several times on a command line."""
        return any(get_origin(option) in (tuple, dict) for option in (self.type, *get_args(self.type)))


def settings() -> list[Setting]:
    """Every setting, in order."""
    found, section = [], ""
    for known in fields(RunConfig):
        section = _SECTIONS.get(known.name, section)
        found.append(Setting(known.name, _hints()[known.name], known.metadata["meaning"], section))
    return found


def _normal(name: str, value: Any, hint: Any) -> Any:
    """What a person may write for a value: one path for a list of them, 2e-5 (a string to YAML), a list of targets."""
    if name == "targets" and isinstance(value, str | Path | Sequence):
        return _by_stem([value] if isinstance(value, str | Path) else value)
    if name == "targets" and isinstance(value, Mapping):
        return {task: str(file) if isinstance(file, Path) else file for task, file in value.items()}
    if name == "train" and isinstance(value, str | Path):
        value = [value]
    if isinstance(value, list | tuple):
        return tuple(str(item) if isinstance(item, Path) else item for item in value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) and not _fits(value, hint):
        for number in (int, float):
            try:
                if _fits(number(value), hint):
                    return number(value)
            except ValueError:
                continue
    return value


_AT_LEAST_1 = (
    "warmup_epochs",
    "warmup_batch_size",
    "warmup_micro_batch_size",
    "lora_rank",
    "lora_alpha",
    "max_length",
    "token_budget",
    "shard_size",
    "n",
)
_SEEDS = ("warmup_seed", "warmup_subset_seed")


def _check_ranges(config: RunConfig) -> None:
    """Raise LessFastError for a value that would fail later, after hours of work perhaps."""

    def require(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise LessFastError(f"setting {name} is {getattr(config, name)!r}; expected {expected}")

    require("out", "://" not in config.out, "a folder of this machine (extract, score and select write to URLs)")
    for name in _AT_LEAST_1:
        value = getattr(config, name)
        require(name, not isinstance(value, int) or value >= 1, "at least 1")
    for name in _SEEDS:
        require(name, 0 <= getattr(config, name) < 2**32, "0 to 2^32 - 1")
    for name in ("warmup_fraction", "fraction"):
        require(name, 0 < getattr(config, name) <= 1, "more than 0 and at most 1")
    require("lora_dropout", 0 <= config.lora_dropout < 1, "at least 0 and less than 1")
    require("warmup_learning_rate", 0 < config.warmup_learning_rate < math.inf, "a finite number above 0")
    if (weights := config.checkpoint_weights) is not None:
        fits = all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
        require("checkpoint_weights", fits, "finite numbers of at least 0, not all of them 0")
        if config.checkpoints is None:
            expected = f"one for each of the {config.warmup_epochs} epochs of warm-up"
            require("checkpoint_weights", len(weights) == config.warmup_epochs, expected)
    if config.modules is not None:
        try:
            re.compile(config.modules)
        except re.error as error:
            raise LessFastError(
                f"setting modules is {config.modules!r}, which is no regular expression ({error})"
            ) from None
    if config.projection != "identity":
        Projection(config.projection, config.dim, config.seed, config.block, config.nnz)


def _by_stem(files: Sequence[Any]) -> dict[str, str]:
    targets: dict[str, str] = {}
    for file in files:
        task = task_name(str(file))
        if task in targets:
            raise LessFastError(
                f"two targets are named {task!r} ({targets[task]} and {file}); give them names of their own"
            )
        targets[task] = str(file)
    return targets


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments)) if len(arguments) < 3 else "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return "a list of " + {str: "strings", float: "numbers"}[arguments[0]]
    if origin is dict:
        return "a table of names and files"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(hint, "nothing")


def _absolute(path: str | None) -> str | None:
    if path is None or not Path(path).expanduser().exists():
        return path
    return str(Path(path).expanduser().absolute())
