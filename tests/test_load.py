"""Loading a model with its adapter: the dtype that both get."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import save_tiny_llama
from transformers import AutoModelForCausalLM

from less_fast import FeatureExtractor, LessFastError, Projection, load_model
from less_fast.compat.less.loading import load_less_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("load")
    base = save_tiny_llama(folder / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_and_adapter_have_the_dtype_that_was_asked_for(paths: tuple[Path, Path], dtype: str) -> None:
    model, _ = load_model(*paths, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {DTYPES[dtype]}


def test_features_of_a_bfloat16_model_are_those_of_the_float32_one_up_to_its_rounding(paths: tuple[Path, Path]) -> None:
    ids = torch.randint(0, 60, (5, 20), generator=torch.Generator().manual_seed(0))
    features = {}
    for dtype in DTYPES:
        model, _ = load_model(*paths, dtype=dtype, device="cpu")
        features[dtype] = FeatureExtractor(model, Projection("srht", 256))({"input_ids": ids, "labels": ids})
    assert features["bfloat16"].dtype == torch.float32
    difference = (features["bfloat16"] - features["float32"]).norm(dim=1) / features["float32"].norm(dim=1)
    assert 0 < difference.max() < 0.05


def test_an_adapter_that_is_cut_off_is_named(paths: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = paths
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(LessFastError, match="adapter"):
        load_model(base, tmp_path / "adapter", device="cpu")
    with pytest.raises(LessFastError, match="adapter's weights cannot be read"):
        load_less_model(tmp_path / "adapter", device="cpu")
