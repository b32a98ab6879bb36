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
        # Of the compiler behind it, if that failed: the first line would name no more than that.
        cause = getattr(error, "inner_exception", error)
        first = next(filter(None, str(cause).splitlines()), type(cause).__name__)
        raise ConfigError(
            f"runtime.compile=true and PyTorch can't compile here ({shown(first)}); it takes a "
            "C++ compiler, Triton on a GPU, and room for what it writes: see to them, or give "
            "runtime.compile=false"
        ) from error
