"""Runs torchrun, and exits with the status of the process that failed first, not with 1.

  python -m moco_dist.distributed.torchrun [OPTIONS OF TORCHRUN] -m moco_dist.pretrain ARGUMENTS

Schedulers that decide by the exit status of a container can then tell a run that has saved and is
to be continued (75) from one that was refused (65, 66, 78).
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from moco_dist.errors import StoppedError, UnavailableError, shown


def main(arguments: list[str]) -> int:
    """Run the processes of this machine; return the exit status."""
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status  # ended by a signal
    except SignalException:  # the processes have had theirs, and time to save
        return StoppedError.exit_status
    except RendezvousError as error:
        text = f"the machines did not meet, or the one that they meet at has left ({shown(error)})"
        print(f"error: {text}; start all of them again", file=sys.stderr)
        return UnavailableError.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
