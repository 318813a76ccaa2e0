"""Optimizer states of several processes: FSDP2 with torch's and accelerate's writers, and DeepSpeed's partitions."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.children import child_environment
from support.small_training import BETAS, EPS, STEPS, small_model, train_alone
from torch import nn

from less_fast.errors import LessFastError
from less_fast.optim.adam import AdamState
from less_fast.optim.inert import load_inert

HERE = Path(__file__).parent
DEEPSPEED = HERE / "fixtures" / "deepspeed"  # written by DeepSpeed 0.19.8 through support/write_deepspeed.py


def assert_moments(state: AdamState, expected: dict[str, Any], rtol: float = 1e-5, atol: float = 1e-7) -> None:
    assert sorted(state.moments) == sorted(expected)
    for name, (m, v) in expected.items():
        torch.testing.assert_close(state.moments[name].m, m, rtol=rtol, atol=atol)
        torch.testing.assert_close(state.moments[name].v, v, rtol=rtol, atol=atol)
        assert state.moments[name].step == STEPS
    assert (state.beta1, state.beta2, state.eps) == (*BETAS, EPS)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saved."""
    out = tmp_path_factory.mktemp("fsdp")
    environment = child_environment(OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "support.write_fsdp", str(out)]
    with (out / "log").open("w") as log:
        processes = [
            subprocess.Popen([*command, str(rank)], cwd=out, env=environment, stderr=log, stdout=log) for rank in (0, 1)
        ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (out / "log").read_text()[-3000:]
    return out


@pytest.mark.parametrize(
    "place",
    [
        "SHARDED_STATE_DICT",  # accelerate's folder, optimizer_0 in it
        "SHARDED_STATE_DICT/optimizer_0",
        "SHARDED_STATE_DICT/optimizer_0/__1_0.distcp",
        "FULL_STATE_DICT",
        "FULL_STATE_DICT/optimizer.bin",
        "FLAT",  # beside the model's weights, in one checkpoint
        "NUMBERED",
    ],
)
def test_what_fsdp2_saves_is_read(fsdp: Path, place: str) -> None:
    state = AdamState.from_checkpoint(fsdp / place, small_model(), rule="torch")
    assert_moments(state, train_alone())


def test_distributed_checkpoints_that_hold_no_single_optimizer_are_refused(fsdp: Path) -> None:
    for place, reason in [
        ("MODEL_ONLY", r"holds no optimizer state \(its first entry is model\.0\.weight\)"),
        ("TWO", r"several optimizers \(a\.optimizer, b\.optimizer\)"),
        ("PER_PROCESS", r"one file per process \(optimizer_0_rank0\.bin\)"),
    ]:
        with pytest.raises(LessFastError, match=reason):
            AdamState.from_checkpoint(fsdp / place, small_model())


def test_damaged_distributed_checkpoints_are_named(fsdp: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(fsdp / "SHARDED_STATE_DICT/optimizer_0", tmp_path / name))

    (copy("missing") / "__1_0.distcp").unlink()
    with pytest.raises(LessFastError, match=r"__1_0\.distcp: missing"):
        AdamState.from_checkpoint(tmp_path / "missing", small_model())
    cut = copy("cut") / "__0_0.distcp"
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(LessFastError, match=r"__0_0\.distcp: not a readable optimizer file"):
        AdamState.from_checkpoint(tmp_path / "cut", small_model())
    metadata = copy("metadata") / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:500])
    with pytest.raises(LessFastError, match=r"\.metadata: not a readable"):
        AdamState.from_checkpoint(tmp_path / "metadata", small_model())


def test_chunks_that_do_not_cover_a_tensor_or_lie_elsewhere_are_refused(fsdp: Path, tmp_path: Path) -> None:
    def edited(name: str, edit: Any) -> Path:
        folder = Path(shutil.copytree(fsdp / "SHARDED_STATE_DICT/optimizer_0", tmp_path / name))
        content = pickle.loads((folder / ".metadata").read_bytes())
        edit(content)
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        return folder

    def drop(content: Any) -> None:
        content.state_dict_metadata["optimizer.state.0.weight.exp_avg"].chunks.pop()

    def escape(content: Any) -> None:
        for place in content.storage_data.values():
            place.relative_path = "../" + place.relative_path

    def compress(content: Any) -> None:
        for place in content.storage_data.values():
            place.transform_descriptors = ["zstd"]

    def forget(content: Any) -> None:
        content.storage_data.clear()

    for edit, reason in [
        (drop, r"the chunks of optimizer\.state\.0\.weight\.exp_avg hold 21 of its 35 entries"),
        (escape, "lies outside the checkpoint"),
        (compress, "stored with the transform"),
        (forget, "does not tell where"),
    ]:
        with pytest.raises(LessFastError, match=reason):
            AdamState.from_checkpoint(edited(edit.__name__, edit), small_model())


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("this-must-not-run",)


def test_no_code_in_metadata_or_in_deepspeeds_files_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": _Payload()}))
    with pytest.raises(LessFastError, match="no metadata of a distributed checkpoint"):
        AdamState.from_checkpoint(tmp_path, small_model())
    (tmp_path / ".metadata").unlink()
    torch.save({"param_shapes": [], "evil": _Payload()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(LessFastError):
        AdamState.from_checkpoint(tmp_path, small_model())
    assert not (tmp_path / "this-must-not-run").exists()


VARIANTS = ("none", "zero1", "zero1_bf16", "zero2_round_robin", "zero3_sub_groups")


@pytest.mark.parametrize("variant", VARIANTS)
def test_deepspeeds_partitions_are_put_together(variant: str) -> None:
    state = AdamState.from_checkpoint(DEEPSPEED / variant, small_model(), rule="torch")
    if (DEEPSPEED / variant / "expected.pt").exists():  # what DeepSpeed itself says the moments are
        saved = torch.load(DEEPSPEED / variant / "expected.pt")
        names = {key.rsplit(".", 1)[0] for key in saved}
        expected = {name: (saved[f"{name}.exp_avg"], saved[f"{name}.exp_avg_sq"]) for name in names}
        assert_moments(state, expected, rtol=0, atol=0)
    # The same training without DeepSpeed; in bfloat16 the weights and gradients are rounded.
    rounding = 0.05 if variant == "zero1_bf16" else 1e-5
    for name, (m, v) in train_alone().items():
        assert (state.moments[name].m - m).norm() < rounding * m.norm(), name
        assert (state.moments[name].v - v).norm() < 2 * rounding * v.norm(), name


def test_deepspeeds_folder_is_found_from_the_checkpoint_the_step_or_a_file(tmp_path: Path) -> None:
    step = DEEPSPEED / "zero1" / "global_step3"
    whole = AdamState.from_checkpoint(step.parent, small_model()).to_dict()
    assert AdamState.from_checkpoint(step, small_model()).to_dict() == whole
    assert AdamState.from_checkpoint(sorted(step.glob("*optim_states.pt"))[0], small_model()).to_dict() == whole
    shutil.copytree(step, tmp_path / "global_step3")
    shutil.copytree(step, tmp_path / "global_step6")
    with pytest.raises(LessFastError, match=r"several optimizer states \(global_step3, global_step6\)"):
        AdamState.from_checkpoint(tmp_path, small_model())
    (tmp_path / "latest").write_text("global_step6")
    assert AdamState.from_checkpoint(tmp_path, small_model()).to_dict() == whole


def test_deepspeed_checkpoints_that_cannot_be_put_together_are_refused(tmp_path: Path) -> None:
    def copy(name: str, variant: str = "zero1") -> Path:
        return Path(shutil.copytree(DEEPSPEED / variant / "global_step3", tmp_path / name))

    def shard(folder: Path, rank: int) -> Path:
        return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    shard(copy("first lost"), 0).unlink()
    shard(copy("second lost"), 1).unlink()
    (copy("no names") / "mp_rank_00_model_states.pt").unlink()
    (copy("tensor parallel") / "mp_rank_01_model_states.pt").touch()
    shard(copy("tensor parallel shards"), 1).rename(
        tmp_path / "tensor parallel shards" / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    )
    (copy("experts") / "expp_rank_0_mp_rank_00_optim_states.pt").touch()
    cut = shard(copy("cut"), 1)
    cut.write_bytes(cut.read_bytes()[:1000])
    other = copy("other model")
    shapes = torch.load(other / "mp_rank_00_model_states.pt", weights_only=True)
    first, *groups = shapes["param_shapes"]
    for folder, changed in [
        (other, {"another.weight": torch.Size([50, 7]), **first}),
        (copy("smaller model"), {"another.weight": torch.Size([1, 7]), "2.weight": first["2.weight"]}),
        (copy("other shape"), {**first, "0.weight": torch.Size([1000, 10**7])}),
        (copy("other shape 3", "zero3_sub_groups"), {**first, "0.weight": torch.Size([1000, 10**7])}),
    ]:
        model_file = sorted(folder.glob("*mp_rank_00_model_states.pt"))[0]
        torch.save({**shapes, "param_shapes": [changed, *groups]}, model_file)
    (tmp_path / "universal" / "zero").mkdir(parents=True)
    no_zero = copy("no zero", "none") / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(no_zero, weights_only=True), "optimizer": None}, no_zero)
    for name, reason in {
        "first lost": "the file of process 0 is missing",
        "second lost": r"found 1 files .* cut into \[2, 2\] parts",
        "no names": "tells the parameters' names and shapes",
        "tensor parallel": "tensor, pipeline or expert parallelism",
        "tensor parallel shards": "zero_pp_rank_0_mp_rank_01.* tensor, pipeline or expert",
        "experts": "expp_rank_0.* tensor, pipeline or expert",
        "cut": "zero_pp_rank_1.*not a readable",
        "other model": r"moments end before those of (0|2)\.weight",
        "smaller model": "the parameters of group 0 take 6 times 4 entries, the moments have 13",
        "other shape": r"the moments of 0\.weight have shape \(1000, 10000000\), the parameter \(5, 7\)",
        "other shape 3": r"the moments of 0\.weight have shape \(1000, 10000000\), the parameter \(5, 7\)",
        "universal": "universal checkpoint",
        "no zero": "no plain optimizer state",
    }.items():
        with pytest.raises(LessFastError, match=reason):
            AdamState.from_checkpoint(tmp_path / name, small_model())


def test_other_optimizers_in_deepspeeds_partitions_are_refused_by_name(tmp_path: Path) -> None:
    for variant, key in (("zero1", "base_optimizer_state"), ("zero3_sub_groups", "optimizer_state_dict")):
        folder = Path(shutil.copytree(DEEPSPEED / variant / "global_step3", tmp_path / variant))
        for file in folder.glob("*optim_states.pt"):
            state = load_inert(file)["optimizer_state_dict"]
            for entry in state[key]["state"].values():
                entry["momentum_buffer"] = entry.pop("exp_avg")
                del entry["exp_avg_sq"]
            plain = {
                "zero_stage": 3 if variant.startswith("zero3") else 1,
                "partition_count": state["partition_count"],
                key: state[key],
            }
            torch.save({"optimizer_state_dict": plain}, folder / "new")
            (folder / "new").replace(file)
        with pytest.raises(LessFastError, match="that of SGD, which keeps momentum"):
            AdamState.from_checkpoint(folder, small_model())


def test_elastic_states_and_steps_kept_by_the_group_are_read(tmp_path: Path) -> None:
    """DeepSpeed's elastic_checkpoint keeps a list of entries without padding, its FusedAdam the step in the group.

    The one is no longer written by default, the other needs a GPU, so that the saved states are rearranged to them:
    see _get_base_optimizer_state in runtime/zero/stage_1_and_2.py and step() in ops/adam/fused_adam.py of DeepSpeed.
    """
    expected = AdamState.from_checkpoint(DEEPSPEED / "zero1", small_model())
    for kind in ("elastic", "fused"):
        folder = Path(shutil.copytree(DEEPSPEED / "zero1" / "global_step3", tmp_path / kind))
        for file in folder.glob("*optim_states.pt"):
            state = load_inert(file)["optimizer_state_dict"]
            base, paddings = state["base_optimizer_state"], state["group_paddings"]
            if kind == "elastic":
                lean = [
                    {key: value[: len(value) - padding] for key, value in entry.items() if key != "step"}
                    for entry, padding in zip(base["state"].values(), paddings)
                ]
                state["base_optimizer_state"], state["base_optimizer_state_step"] = lean, STEPS
            else:
                for entry, group in zip(base["state"].values(), base["param_groups"]):
                    group["step"] = int(entry.pop("step"))
            kept = ("base_optimizer_state", "base_optimizer_state_step", "partition_count")
            plain = {"zero_stage": 1, **{key: state[key] for key in kept if key in state}}
            torch.save({"optimizer_state_dict": plain}, folder / "new")
            (folder / "new").replace(file)  # its tensors are mapped from the old one
        state = AdamState.from_checkpoint(folder, small_model())
        assert state.to_dict() == expected.to_dict()


def test_paddings_between_the_parameters_of_a_flat_vector_are_left_out(tmp_path: Path) -> None:
    """Recent DeepSpeed may align each parameter: param_alignment_paddings, as its zero_to_fp32.py skips them."""
    shapes = [{"0.weight": torch.Size([2, 3]), "0.bias": torch.Size([2])}]
    torch.save({"param_shapes": shapes}, tmp_path / "mp_rank_00_model_states.pt")
    eight, gap = torch.arange(1.0, 9.0), torch.full((2,), 99.0)
    flat = torch.cat([eight[:6], gap, eight[6:]])  # 2 x 3, two of padding, 2
    state = {
        "zero_stage": 2,
        "partition_count": [1],
        "param_alignment_paddings": [[2, 0]],
        "base_optimizer_state": {
            "state": {0: {"step": torch.tensor(5.0), "exp_avg": flat, "exp_avg_sq": flat.square()}},
            "param_groups": [{"betas": (0.9, 0.99), "eps": 1e-8, "params": [0]}],
        },
    }
    torch.save({"optimizer_state_dict": state}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    moments = AdamState.from_checkpoint(tmp_path, nn.Sequential(nn.Linear(3, 2))).moments
    assert moments["0.weight"].m.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert moments["0.bias"].v.tolist() == [49.0, 64.0]


def test_only_the_models_parameters_are_put_together(fsdp: Path) -> None:
    part = nn.Sequential(nn.Linear(7, 5))
    for place in (fsdp / "SHARDED_STATE_DICT", fsdp / "FULL_STATE_DICT", DEEPSPEED / "zero3_sub_groups"):
        assert sorted(AdamState.from_checkpoint(place, part).moments) == ["0.bias", "0.weight"]
    other = nn.ModuleDict({"head": nn.Linear(7, 5)})
    with pytest.raises(
        LessFastError, match=r"none of the state's parameters \(0\.weight .* the model \(head\.weight\)"
    ):
        AdamState.from_checkpoint(fsdp / "FULL_STATE_DICT", other)
