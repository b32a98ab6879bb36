"""The command `python -m moco_dist.pretrain`, and `moco-pretrain` after an installation."""

from __future__ import annotations

from moco_dist.config.recipe import PretrainConfig
from moco_dist.pretrain.run import __doc__ as purpose
from moco_dist.pretrain.run import run
from moco_dist.runs import command


def main() -> None:
    """Run the command with the arguments of this process."""
    command.main(PretrainConfig, run, purpose)


if __name__ == "__main__":
    main()
