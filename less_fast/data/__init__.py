"""Examples, templates with their label masks, and batches: everything from a user's file to padded token tensors."""

from less_fast.data.batches import CPU_BATCH_COST, collate, plan_batches
from less_fast.data.examples import Examples, load_examples
from less_fast.data.templates import IGNORED, TEMPLATES, Encoded, encode, encode_all

__all__ = [
    "CPU_BATCH_COST",
    "IGNORED",
    "TEMPLATES",
    "Encoded",
    "Examples",
    "collate",
    "encode",
    "encode_all",
    "load_examples",
    "plan_batches",
]
