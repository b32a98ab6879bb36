"""Compiling: views and encoders by torch.compile, ahead of the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from moco_dist.errors import ConfigError, UserError, shown


def compiled(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `work` compiled as one graph, again for each new shape.

    Raises ConfigError where PyTorch can't compile, or was told not to.
    """
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(name) == "1":
            raise ConfigError(
                f"runtime.compile=true and the environment's {name}=1, which switches compiling "
                "off; take one of them away"
            )
    # On a machine without a GPU it warns that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        return torch.compile(work, fullgraph=True, dynamic=False)
    except RuntimeError as error:  # a Python that it doesn't know
        raise _failed(error) from error


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what a compiler fails at into ConfigError, one sentence.

    A UserError that a signal raised while the compiler ran comes out as that UserError.
    """
    try:
        yield
    except TorchDynamoException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        # Of the compiler behind it, if that failed: the first line would name no more than that.
        raise _failed(getattr(error, "inner_exception", error)) from error


def _failed(cause: Exception) -> ConfigError:
    first = next(filter(None, str(cause).splitlines()), type(cause).__name__)
    return ConfigError(
        f"runtime.compile=true and PyTorch can't compile here ({shown(first)}); it takes a C++ "
        "compiler, Triton on a GPU, and room for what it writes: see to them, or give "
        "runtime.compile=false"
    )
