"""Optimizer states and the update rules made of them."""

from less_fast.optim.adam import AdamState

__all__ = ["AdamState"]
