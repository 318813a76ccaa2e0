"""Models whose weights lie on the host, the disk or several devices, fetched by accelerate's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from support.large_models import adam_state, live_tensors, save_adapted
from support.models import adapted, batch, causal_lm
from support.tiny import examples
from torch import nn

import less_fast.features
from less_fast import FeatureExtractor, Projection, extract, load_model
from less_fast.features import MultiFeatureExtractor, Output
from less_fast.model.load import fingerprint

PROJECTION = Projection("srht", 256, seed=4)
FIRST_LAYER_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
ALL_ON_DISK = {"": "disk"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_adapted(tmp_path_factory.mktemp("large"))


def offloaded(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("device_map", [FIRST_LAYER_ON_DISK, ALL_ON_DISK], ids=["a layer", "all"])
def test_a_model_loaded_with_a_device_map(
    paths: tuple[Path, Path], device_map: dict[str, str], checkpoint_activations: bool
) -> None:
    plain, _ = load_model(*paths, device="cpu")
    state = adam_state(plain)
    expected = FeatureExtractor(plain, PROJECTION, state)(batch())
    model, _ = load_model(*paths, device_map=device_map)
    away = offloaded(model)
    assert away and all("lora_" not in name for name in away)
    extractor = FeatureExtractor(model, PROJECTION, state, checkpoint_activations=checkpoint_activations)
    assert extractor.layout == FeatureExtractor(plain, PROJECTION, state).layout
    assert torch.equal(extractor(batch()), expected)
    assert torch.equal(extractor(batch()), expected)
    assert offloaded(model) == away  # every weight was put away again
    assert fingerprint(model) == fingerprint(plain)
    assert offloaded(model) == away


def test_a_store_of_an_offloaded_model_is_that_of_the_plain_one(paths: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = load_model(*paths, device="cpu")
    model, _ = load_model(*paths, device_map=ALL_ON_DISK)
    stores = [
        extract(m, examples("sums", 6), tmp_path / name, projection=PROJECTION, progress=False)
        for name, m in (("plain", plain), ("offloaded", model))
    ]
    assert stores[0].facts == stores[1].facts
    assert torch.equal(*(torch.from_numpy(store[:]) for store in stores))


@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_offloaded_with_its_adapter(architecture: str, checkpoint_activations: bool) -> None:
    """As accelerate, or PEFT by itself, spreads a model: adapters are fetched like other weights."""
    model = adapted(causal_lm(architecture))
    expected = FeatureExtractor(model, PROJECTION)(batch())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    away = offloaded(model)
    assert any("lora_A" in name for name in away)
    extractor = FeatureExtractor(model, PROJECTION, checkpoint_activations=checkpoint_activations)
    assert torch.equal(extractor(batch()), expected)
    assert offloaded(model) == away
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in flags} == flags


def test_checkpointed_layers_let_go_the_weights_that_they_fetched(tmp_path: Path) -> None:
    most = {}
    data = batch((3, 4))
    for on in (False, True):
        model = adapted(causal_lm(num_hidden_layers=8, intermediate_size=512))
        disk_offload(model, tmp_path / str(on), execution_device=torch.device("cpu"))
        extractor = MultiFeatureExtractor(model, [Output(Projection("srht", 64))], checkpoint_activations=on)
        with live_tensors() as live:
            extractor(data)
        most[on] = live.most
    assert most[True] < 0.4 * most[False]


def test_parts_of_two_devices_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them stands for another: torch tells "cpu" from "cpu:0", where tensors are the same."""
    model = adapted(causal_lm())
    state = adam_state(model)
    outputs = [
        Output(PROJECTION, state),
        Output(Projection("sjlt", 100, seed=2)),
        Output(Projection("srht", 128, seed=4)),
    ]
    alone = MultiFeatureExtractor(model, outputs)(batch())

    @contextmanager
    def alternating(sites: Any, default: torch.device) -> Iterator[list[torch.device]]:
        yield [torch.device("cpu", 0) if "layers.1" in site.name else default for site in sites]

    monkeypatch.setattr(less_fast.features, "recorded_devices", alternating)
    extractor = MultiFeatureExtractor(model, outputs)
    assert len(extractor._scratch) == 2
    together = extractor(batch())
    assert torch.equal(together.losses, alone.losses)
    for found, expected in zip(together.features, alone.features):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_on_the_host_that_a_gpu_computes_with(paths: tuple[Path, Path]) -> None:
    plain, _ = load_model(*paths, device="cuda")
    expected = FeatureExtractor(plain, PROJECTION)(batch())
    model, _ = load_model(*paths, device_map={**dict.fromkeys(FIRST_LAYER_ON_DISK, 0), "model.layers.1": "cpu"})
    assert offloaded(model)
    found = FeatureExtractor(model, PROJECTION, checkpoint_activations=True)(batch())
    assert found.is_cuda
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
