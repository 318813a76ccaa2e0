"""What LESS takes of a forward pass alone: the last token's hidden state (``reps``) and each example's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from less_fast.features import BatchFeatures, Output
from less_fast.model.capture import frozen_eval
from less_fast.model.inputs import Inputs, checked
from less_fast.model.loss import check_causal, check_length_invariant, example_losses, label_logits
from less_fast.model.packed import choose_layout
from less_fast.model.sites import embedding_rows
from less_fast.projection import Projection


class ForwardExtractor:
    """A batch in, one float32 row per example out, by the same calls as of ``MultiFeatureExtractor``.

    ``kind``: ``reps``, the last layer's output (after the final norm) at the last token, (N, width); or ``loss``, the
    mean cross-entropy of the example's labels, (N, 1). ``n_labels`` counts what a row needs: tokens or labels.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.model, self.kind = model, kind
        self.device = next(model.parameters()).device
        self.batches = choose_layout(model, self.device, "never")
        self._vocabulary = embedding_rows(model)
        with frozen_eval(model):
            check_causal(model)
        config: Any = getattr(model, "config", None)
        dim = config.get_text_config().hidden_size if kind == "reps" else 1
        self.outputs = [Output(Projection("identity", dim))]
        self.max_examples: int | None = None  # of a batch; its tokens bound it
        self.batch_cost: int | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> BatchFeatures:
        """Rows of a batch of ``input_ids``, ``labels`` and ``attention_mask`` (N, T)."""
        inputs = Inputs.of(checked(batch, self._vocabulary), self.device, packed=False)
        lengths = inputs.tokens.lengths
        check_length_invariant(self.model, lengths)
        with torch.no_grad(), frozen_eval(self.model):
            if self.kind == "loss":
                losses = self._losses(inputs)
                return BatchFeatures([losses[:, None]], losses, inputs.labels.counts)
            rows = self._last_states(inputs, torch.tensor(lengths, device=self.device))
            return BatchFeatures([rows], torch.zeros(len(rows), device=self.device), torch.tensor(lengths))

    def _losses(self, inputs: Inputs) -> Tensor:
        if not inputs.labels.target.numel():
            return torch.zeros(len(inputs.tokens), device=self.device)
        return example_losses(label_logits(self.model, inputs.input_ids, inputs.labels), inputs.labels)

    def _last_states(self, inputs: Inputs, lengths: Tensor) -> Tensor:
        if not inputs.input_ids.numel():
            return torch.zeros(len(lengths), self.outputs[0].projection.dim, device=self.device)
        get_base: Any = getattr(self.model, "get_base_model", lambda: self.model)
        decoder = get_base().base_model  # without the output head, whose logits nothing here reads
        states = decoder(input_ids=inputs.input_ids, use_cache=False).last_hidden_state
        return states[torch.arange(len(lengths), device=self.device), (lengths - 1).clamp(min=0)].float()
