"""Which optimizer, other than Adam, wrote a state, as far as the state tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from less_fast.errors import LessFastError
from less_fast.optim.bitsandbytes import unwrap
from less_fast.optim.moments import SavedState

# (keys of a parameter group, keys of a parameter's state, optimizer and what it keeps); the first that fits counts.
_SIGNS: Sequence[tuple[set[str], set[str], str]] = (
    ({"update_proj_gap"}, set(), "GaLore or APOLLO, whose moments are those of projected gradients"),
    ({"weight_lr_power"}, set(), "a schedule-free optimizer, which keeps no first moment"),
    ({"d_coef"}, set(), "Prodigy or D-Adaptation, whose moments are scaled by its own step size"),
    ({"ns_steps"}, set(), "Muon, which keeps momentum alone"),
    ({"relative_step"}, set(), "Adafactor, which keeps row and column means instead of a second moment"),
    ({"beta2_decay"}, set(), "Adafactor, which keeps row and column means instead of a second moment"),
    (set(), {"exp_avg_sq_row", "exp_avg_res_row"}, "CAME, which keeps row and column means"),
    (set(), {"exp_avg_sq_row"}, "Adafactor, which keeps row and column means instead of a second moment"),
    (set(), {"mu_product"}, "NAdam, whose update is not Adam's"),
    ({"momentum_decay"}, set(), "NAdam, whose update is not Adam's"),
    (set(), {"exp_inf"}, "Adamax, which keeps a maximum instead of a second moment"),
    (set(), {"max_exp_avg_sq"}, "Adam with amsgrad=True, whose update divides by a maximum"),
    (set(), {"exp_avg_diff"}, "Adan, which keeps a third moment"),
    (set(), {"unorm_vec"}, "LAMB or LARS, or another optimizer with a trust ratio"),
    (set(), {"hessian"}, "Sophia, which keeps a Hessian instead of a second moment"),
    (set(), {"worker_error"}, "1-bit Adam or 1-bit LAMB, whose second moment is frozen"),
    (set(), {"square_avg", "acc_delta"}, "Adadelta, which keeps no first moment"),
    (set(), {"square_avg"}, "RMSprop, which keeps no first moment"),
    (set(), {"step_size", "prev"}, "Rprop, which keeps signs and step sizes"),
    (set(), {"ax", "mu"}, "ASGD, which keeps averaged weights"),
    (set(), {"sum"}, "Adagrad, which keeps a sum of squares"),
    (set(), {"momentum_buffer"}, "SGD, which keeps momentum alone"),
    ({"dampening"}, set(), "SGD, which keeps no moments"),
)


def refuse_others(saved: SavedState) -> None:
    """Raise LessFastError naming the optimizer where the state is not that of an Adam."""
    entries = [unwrap(entry) for entry in saved.state.values() if isinstance(entry, Mapping)]
    for entry in entries or [{}]:
        if name := _optimizer(entry, saved.groups):
            raise LessFastError(
                f"{saved.source}: the optimizer state is that of {name}; expected Adam or AdamW; train with one of "
                "them, or use precondition 'sgd' or 'sign', which need no state"
            )


def _optimizer(entry: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str | None:
    for group_keys, entry_keys, name in _SIGNS:
        if entry_keys <= set(entry) and (not group_keys or any(group_keys <= set(group) for group in groups)):
            return name
    if any(isinstance(group.get("betas"), (tuple, list)) and len(group["betas"]) > 2 for group in groups):
        return "AdEMAMix or another optimizer of three betas"
    # torch's Adam and AdamW have amsgrad beside it.
    if any("decoupled_weight_decay" in group and "amsgrad" not in group for group in groups):
        return "RAdam, whose update is not Adam's"
    if "exp_avg" in entry and "exp_avg_sq" not in entry:
        return "Lion, which keeps one moment"
    if "state1" in entry and "state2" not in entry:
        return "a bitsandbytes optimizer of one moment (Lion, SGD, RMSprop, Adagrad or LARS)"
    return None
