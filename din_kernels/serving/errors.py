"""Why a request was not scored, other than its own fault (which is ``ValueError``, ``TypeError`` or ``IndexError``)."""


class ScoringError(RuntimeError):
    """Base class."""


class Overloaded(ScoringError):
    """The queue is full: raised at once, so that callers can shed load instead of waiting for an answer that is too late."""


class DeadlineExceeded(ScoringError):
    """The request waited past its deadline and was dropped before any work was done on it."""


class Closed(ScoringError):
    """The scorer was shut down."""
