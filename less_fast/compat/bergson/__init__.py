"""bergson 2.5: its random matrices, its per-module features from our capture, and indexes on disk that it reads.

bergson itself is not needed, except where its own ``Builder`` or ``Scorer`` is handed in.
"""

from less_fast.compat.bergson.collector import ModuleCollector
from less_fast.compat.bergson.index import build_index, write_index
from less_fast.compat.bergson.matrix import ModuleProjection, random_matrix

__all__ = ["ModuleCollector", "ModuleProjection", "build_index", "random_matrix", "write_index"]
