"""bitsandbytes' Adam states dequantised, and the states of other optimizers refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.small_training import stepped
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.optim.adam import AdamState


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    if os.environ.get("LESS_FAST_STRICT") == "1":
        import bitsandbytes  # of the test extra: its absence is an error here
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the test extra, is not installed")
    return bitsandbytes


def three_sizes() -> nn.Module:
    """Many blocks, a last block that is not full, and one below bitsandbytes' least size for 8 bits (4096)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 129, bias=False), nn.Linear(129, 7, bias=False))


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit", "AdamW", "PagedAdamW", "PagedAdamW32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_states_of_bitsandbytes_are_adams(bnb: ModuleType, name: str, tmp_path: Path) -> None:
    """Paged states lie in memory of another kind, which a saved file does not show."""
    model, twin = three_sizes(), three_sizes()
    optimizer = stepped(getattr(bnb.optim, name)(model.parameters(), betas=(0.9, 0.95), eps=1e-7), steps=3)
    exact = stepped(torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), eps=1e-7), steps=3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = AdamState.from_checkpoint(tmp_path, model, rule="torch")
    assert (state.beta1, state.beta2, state.eps) == (0.9, 0.95, 1e-7)
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters()):
        got, live, adam = state.moments[key], optimizer.state[parameter], exact.state[other]
        assert got.step == 3 and got.m.dtype == got.v.dtype == torch.float32
        eight_bits = live["state1"].dtype == torch.uint8
        assert eight_bits == ("8bit" in name and parameter.numel() >= 4096)
        for moment, number in ((got.m, 1), (got.v, 2)):
            if eight_bits:  # bitsandbytes' own kernel must undo its own codes to the same numbers
                own = bnb.functional.dequantize_blockwise(
                    live[f"state{number}"],
                    absmax=live[f"absmax{number}"],
                    code=live[f"qmap{number}"],
                    blocksize=256,
                )
                assert torch.equal(moment, own)
            else:
                assert torch.equal(moment, live[f"state{number}"])
        # Three steps' rounding to 8 bits, with levels about 1% (near the maximum) to 10% apart.
        tolerance = 0.05 if eight_bits else 1e-5
        assert (got.m - adam["exp_avg"]).norm() < tolerance * adam["exp_avg"].norm()
        assert (got.v - adam["exp_avg_sq"]).norm() < 2 * tolerance * adam["exp_avg_sq"].norm()


def test_blocks_of_2048_of_older_versions_are_told_by_the_number_of_scales(tmp_path: Path) -> None:
    """Up to 0.44 an entry was flat: state1, qmap1, absmax1 … beside step, and a scale for every 2048 codes."""
    torch.manual_seed(0)
    parameter = nn.Linear(100, 50, bias=False)  # 5000 codes: two whole blocks and one of 904
    codes = [torch.randint(0, 256, (50, 100), dtype=torch.uint8) for _ in range(2)]
    maps = [torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)]
    scales = [torch.tensor([0.5, 2.0, 8.0]), torch.tensor([1.0, 3.0, 9.0])]
    keys = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
    entry = {"step": 7, **dict(zip(keys, [*codes, *maps, *scales]))}
    torch.save({"state": {0: entry}, "param_groups": [{"params": [0]}]}, tmp_path / "optimizer.pt")
    got = AdamState.from_checkpoint(tmp_path, parameter).moments["weight"]
    for moment, code, levels, scale in zip((got.m, got.v), codes, maps, scales):
        expected = [levels[c] * scale[i // 2048] for i, c in enumerate(code.flatten().tolist())]
        assert torch.equal(moment, torch.stack(expected).view(50, 100))
    assert got.step == 7


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"absmax1": torch.ones(7)}, "has 5000 codes, 256 levels and 7 scales"),
        ({"qmap2": torch.ones(16)}, "the 8-bit state2 of weight has 5000 codes, 16 levels"),
        ({"absmax1": None, "max1": torch.ones(1)}, "has no qmap1 and absmax1; .* block_wise=True"),
        ({"unorm_vec": torch.ones(1)}, "LAMB or LARS"),
        ({"state2": None, "qmap2": None, "absmax2": None}, "a bitsandbytes optimizer of one moment"),
    ],
)
def test_codes_that_do_not_fit_their_scales_are_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    codes = torch.zeros(50, 100, dtype=torch.uint8)
    whole = {f"{key}{n}": value for n in (1, 2) for key, value in [("state", codes), ("absmax", torch.ones(20))]}
    entry = {**whole, "qmap1": torch.zeros(256), "qmap2": torch.zeros(256), **change}
    entry = {key: value for key, value in entry.items() if value is not None}
    torch.save({"state": {0: entry}, "param_groups": [{"params": [0]}]}, tmp_path / "optimizer.pt")
    with pytest.raises(LessFastError, match=reason):
        AdamState.from_checkpoint(tmp_path, nn.Linear(100, 50, bias=False))


@pytest.mark.parametrize("name", ["Lion8bit", "AdEMAMix8bit", "LAMB", "RMSprop8bit", "Adagrad8bit", "SGD8bit"])
def test_other_optimizers_of_bitsandbytes_are_refused(bnb: ModuleType, name: str, tmp_path: Path) -> None:
    model = three_sizes()
    settings = {"momentum": 0.9} if name == "SGD8bit" else {}
    optimizer = stepped(getattr(bnb.optim, name)(model.parameters(), lr=1e-3, **settings))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    reasons = {"AdEMAMix8bit": "AdEMAMix", "LAMB": "LAMB"}
    with pytest.raises(LessFastError, match=reasons.get(name, "one moment .Lion, SGD, RMSprop, Adagrad")):
        AdamState.from_checkpoint(tmp_path, model)


Maker = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def transformers_adafactor(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters)


@pytest.mark.parametrize(
    "make, name",
    [
        (transformers_adafactor, "Adafactor"),
        (torch.optim.Adafactor, "Adafactor"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD, which keeps no moments"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "SGD, which keeps momentum"),
        (torch.optim.Muon, "Muon"),
        (torch.optim.RMSprop, "RMSprop"),
        (torch.optim.Adagrad, "Adagrad"),
        (torch.optim.Adadelta, "Adadelta"),
        (torch.optim.Adamax, "Adamax"),
        (torch.optim.NAdam, "NAdam"),
        (torch.optim.RAdam, "RAdam"),
        (torch.optim.Rprop, "Rprop"),
        (torch.optim.ASGD, "ASGD"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad=True"),
    ],
)
def test_optimizers_that_are_no_adam_are_refused_by_name(make: Maker, name: str, tmp_path: Path) -> None:
    model = nn.Linear(40, 30, bias=False)
    torch.save(stepped(make(model.parameters())).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(LessFastError, match=rf"optimizer\.pt: the optimizer state is that of .*{name}.*expected Adam"):
        AdamState.from_checkpoint(tmp_path, model)


@pytest.mark.parametrize(
    "entry, group, name",
    [
        # galore_torch adds rank, update_proj_gap, scale and proj_type to the group; its moments have the low rank.
        (("exp_avg", "exp_avg_sq"), {"rank": 8, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}, "GaLore"),
        (("exp_avg",), {"betas": (0.9, 0.99)}, "Lion"),  # lion-pytorch
        (("z", "exp_avg_sq"), {"weight_lr_power": 2.0, "r": 0.0}, "schedule-free"),  # schedulefree
        (("exp_avg", "exp_avg_sq", "s", "p0"), {"d": 1e-6, "d_coef": 1.0}, "Prodigy"),  # prodigyopt
        (("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row"), {}, "CAME"),  # came-pytorch
        (("exp_avg", "exp_avg_sq", "exp_avg_diff"), {"betas": (0.98, 0.92, 0.99)}, "Adan"),  # adan-pytorch
        (("exp_avg", "hessian"), {}, "Sophia"),
        (("exp_avg", "exp_avg_sq", "worker_error", "server_error"), {}, "1-bit"),  # DeepSpeed
    ],
)
def test_optimizers_of_other_packages_are_known_by_their_keys(
    entry: tuple[str, ...], group: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """The keys are those that each package's step() puts into its state and __init__ into its groups."""
    state = {0: dict.fromkeys(entry, torch.zeros(30, 40))}
    torch.save({"state": state, "param_groups": [{**group, "params": [0]}]}, tmp_path / "optimizer.pt")
    with pytest.raises(LessFastError, match=name):
        AdamState.from_checkpoint(tmp_path, nn.Linear(40, 30, bias=False))
