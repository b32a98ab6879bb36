"""Tests run on one thread each: several processes of them share two cores."""

from __future__ import annotations

import atexit
import os
import tempfile

import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Those that are about it say so.
os.environ["WANDB_MODE"] = "disabled"
# The datasets library reads no hub and leaves nothing in the user's cache.
_datasets = tempfile.TemporaryDirectory()
atexit.register(_datasets.cleanup)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": _datasets.name}
