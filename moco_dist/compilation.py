"""Compiling: views and encoders by torch.compile, ahead of the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from moco_dist.errors import ConfigError, shown


def compiled(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `work` compiled, as a whole or not at all, anew for each other shape."""
    # On a machine without a GPU it warns that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(work, fullgraph=True, dynamic=False)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what a compiler fails at into ConfigError, one sentence."""
    try:
        yield
    except TorchDynamoException as error:
        first = next(filter(None, str(error).splitlines()), "")
        raise ConfigError(
            f"runtime.compile=true and PyTorch can't compile here ({shown(first)}); it takes a "
            "C++ compiler, and Triton on a GPU: install them, or give runtime.compile=false"
        ) from error
