"""What a captured step says and leaves when its flag on the device says that a number was bad.

  python -m tests.stand_in.refused CONFIG key=value ...     in a process with the stand-in

Prints the step that was marked, the error's details, and where the host stands, as JSON.
"""

from __future__ import annotations

import json
import os
import sys

from moco_dist.errors import NumbersError
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.step_graph import Stepper
from tests.stand_in.measure import built

if __name__ == "__main__":
    trainer = built(sys.argv[1:])
    trainer.step, queue = 1, trainer.moco.queue
    take = Stepper(trainer, RunHooks(trainer))
    while not take.captured or take.count < 3:
        take()
        if take.captured:
            take.read.zero_()  # which would hold made-up numbers
    marked, before = trainer.step - 1, queue.enqueued - take._keys
    # Of the newest replay, which the host reads after it has launched the next one.
    take.read[(take.count - 1) % len(take.read), -1] = 1
    error = None
    try:
        take()
    except NumbersError as raised:
        error = raised.details["step"]
    print(json.dumps([marked, error, trainer.step, before, queue.enqueued]), flush=True)
    os._exit(0)
