"""The features of a part of the data set, of files that may turn out to be unreadable."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moco_dist.config.probe import ProbeConfig
from moco_dist.data import datasets, run_lists
from moco_dist.distributed import faults
from moco_dist.encoders import features
from moco_dist.errors import DataError
from moco_dist.runs.session import Session


def extract(
    backbones: Iterable[nn.Module],
    images: datasets.AnyImages,
    config: ProbeConfig,
    session: Session,
    splits: datasets.Splits,
) -> Tensor:
    """Return the features of unaugmented images, (encoders, images, features), on every process.

    What can't be read is noted in the run. Raises DataError on all processes.
    """
    found = []
    try:
        with session.accelerator.autocast(), faults.agreeing():
            for each in backbones:
                found.append(features.extract(each, images, config.views, config.batch_size))
    except DataError as error:
        if error.shared:
            run_lists.share(session.directory, splits.train, splits.test)
        raise
    run_lists.share(session.directory, splits.train, splits.test)
    return torch.stack(found)
