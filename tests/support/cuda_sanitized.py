"""Run by a test, in a process with AddressSanitizer: every emulated CUDA kernel once, on sizes that fit nothing."""

from __future__ import annotations

import torch

from less_fast.projection import Projection
from support.cuda_emulated import DTYPES, accumulate_emulated

count = 0
for dtype in DTYPES:
    for projection in (Projection("srht", 192, block=32), Projection("sjlt", 77, nnz=3)):
        grads = torch.randn(5, 5_003, generator=torch.Generator().manual_seed(0)).to(dtype)
        grads[:, 4_500] = 1e4
        features = torch.zeros(5, projection.dim)
        accumulate_emulated(features, grads[:, :4_997], projection, 3)
        assert torch.isfinite(features).all() and features.any()
        count += 1
print(f"sketches: {count}")
