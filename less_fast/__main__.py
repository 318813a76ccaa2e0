"""``python -m less_fast``, and so ``torchrun -m less_fast``: the command line."""

from __future__ import annotations

from less_fast.cli import main

main()
