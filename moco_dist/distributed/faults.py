"""An error of one process alone, which all processes raise together.

A collective that one process does not enter would cost the others their state, and the user the
reason. So a run, which looks for errors between two steps, has them kept until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moco_dist.distributed import peers
from moco_dist.errors import UserError


class _Kept:
    """What this process keeps; there is one object."""

    def __init__(self) -> None:
        self.error: UserError | None = None
        self.agreeing = False


_kept = _Kept()


@contextmanager
def agreeing() -> Iterator[None]:
    """Have `refuse` keep its errors until `agree`, which all processes call, here at the end.

    A session also looks for them between two steps and between the batches of an evaluation.
    """
    outer, _kept.agreeing = _kept.agreeing, True
    try:
        yield
        agree()
    finally:
        _kept.agreeing = outer
        _kept.error = _kept.error if outer else None


def refuse(error: UserError) -> None:
    """Raise `error`, or keep the first one for all processes to raise together."""
    if not _kept.agreeing:
        raise error
    _kept.error = _kept.error or error


def pending() -> bool:
    """Return whether this process keeps an error."""
    return _kept.error is not None


def agree() -> None:
    """Raise on all processes what one of them keeps; a collective."""

    def mine() -> None:
        if _kept.error:
            raise _kept.error

    peers.together(mine)
