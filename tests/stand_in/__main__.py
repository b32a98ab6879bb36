"""`python -m tests.stand_in`: build the stand-in; exit with 1 and the reason if it cannot be."""

from __future__ import annotations

import sys

from tests import stand_in

if reason := stand_in.missing():
    print(reason)
    sys.exit(1)
stand_in.built()
