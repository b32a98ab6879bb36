"""What a check of the doctor returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A line of the table: what was checked, what was found, and a sentence if it will fail."""

    about: str
    found: str
    fault: str = ""
    # A sentence about what costs accuracy or time without ending the run.
    warning: str = ""
