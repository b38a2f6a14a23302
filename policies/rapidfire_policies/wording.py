"""Numbers in sentences."""

from __future__ import annotations


def counted(count: int, noun: str, *, many: str = "") -> str:
    """A count with its noun.

    Args:
        count: How many.
        noun: Of one.
        many: Of several, where an `s` does not make it.

    >>> counted(1, "chunk"), counted(0, "chunk"), counted(2, "more reason")
    ('1 chunk', '0 chunks', '2 more reasons')
    >>> counted(1, "trial has ended", many="trials have ended")
    '1 trial has ended'
    """
    return f"{count} {noun if count == 1 else many or f'{noun}s'}"
