"""The map over a store's shards, run by Ray Data on a pool of actors."""

from less_fast.on_ray.engine import extract_on_ray

__all__ = ["extract_on_ray"]
