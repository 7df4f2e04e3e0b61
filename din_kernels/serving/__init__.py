"""Scoring candidates for visitors with a trained Deep Interest Network."""

from .batching import Counters
from .buckets import Bucket
from .errors import Closed, DeadlineExceeded, Overloaded, ScoringError
from .parts import DinParts
from .requests import Candidates, Request, Visitor
from .scorer import Scorer

__all__ = [
    "Bucket",
    "Candidates",
    "Closed",
    "Counters",
    "DeadlineExceeded",
    "DinParts",
    "Overloaded",
    "Request",
    "Scorer",
    "ScoringError",
    "Visitor",
]
