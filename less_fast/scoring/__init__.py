"""From feature stores to scores, and from scores to a selection."""

from less_fast.scoring.duplicates import Duplicates
from less_fast.scoring.mixture import Caps, Share, composition
from less_fast.scoring.output import stream_scores, write_scores
from less_fast.scoring.ranking import Ranking, balanced, best, quotas, round_robin
from less_fast.scoring.scores import Best, Scores, best_rows, influence
from less_fast.scoring.selection import Selection, pick, select
from less_fast.scoring.stream import ScoreStream

__all__ = [
    "Best",
    "Caps",
    "Duplicates",
    "Ranking",
    "ScoreStream",
    "Scores",
    "Selection",
    "Share",
    "balanced",
    "best",
    "best_rows",
    "composition",
    "influence",
    "pick",
    "quotas",
    "round_robin",
    "select",
    "stream_scores",
    "write_scores",
]
