"""The model side: which matrices, capture by hooks, per-example loss, loading."""

from less_fast.model.load import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
