"""`python -m tests.stand_in`: build the stand-in; exit with 1 and the reason if it cannot be.

`python -m tests.stand_in CONFIG [key=value ...]` also prints what a step launches and waits for.
"""

from __future__ import annotations

import sys

from tests import stand_in

if reason := stand_in.missing():
    print(reason)
    sys.exit(1)
stand_in.built()
if sys.argv[1:]:
    ended = stand_in.python("tests.stand_in.measure", *sys.argv[1:])
    print(ended.stdout + ended.stderr, end="")
    sys.exit(ended.returncode)
