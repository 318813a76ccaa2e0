"""From feature stores to scores, and from scores to a selection."""

from less_fast.scoring.output import write_scores
from less_fast.scoring.scores import Scores, influence
from less_fast.scoring.selection import Share, composition, select

__all__ = ["Scores", "Share", "composition", "influence", "select", "write_scores"]
