"""The command `python -m moco_dist.probe`, and `moco-probe` after an installation."""

from __future__ import annotations

from moco_dist.config.probe import ProbeConfig
from moco_dist.probe.run import __doc__ as purpose
from moco_dist.probe.run import run
from moco_dist.runs import command


def main() -> None:
    """Run the command with the arguments of this process."""
    command.main(ProbeConfig, run, purpose)


if __name__ == "__main__":
    main()
