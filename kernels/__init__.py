"""Triton kernels, installed as ``less_fast.kernels``: random tables, accumulation, compilation ahead of time."""
