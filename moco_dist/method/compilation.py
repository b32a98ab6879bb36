"""Compiles views and encoders with torch.compile, before the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from moco_dist.errors import ConfigError, UserError, shown


def compiled(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `work` compiled as one graph, again for each new shape.

    Raises ConfigError if PyTorch can't compile or the environment forbids it.
    """
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(name) == "1":
            raise ConfigError(
                f"runtime.compile=true and the environment's {name}=1, which switches compiling "
                "off; remove one of them"
            )
    # On a GPU, small kernels that need nothing of one another become one: casts of weights, sums.
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] | None = {"combo_kernels": True} if on_gpu else None
    # It warns on every machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        return torch.compile(work, fullgraph=True, dynamic=False, options=options)
    except RuntimeError as error:  # an unsupported version of Python
        raise _failed(error) from error


@contextmanager
def compile_errors() -> Iterator[None]:
    """Raise a compiler's failure as ConfigError, but a UserError that a signal raised as it is."""
    try:
        yield
    except TorchDynamoException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        # The inner exception has the reason; the outer one only names the compiler that failed.
        raise _failed(getattr(error, "inner_exception", error)) from error


def _failed(cause: Exception) -> ConfigError:
    first = next(filter(None, str(cause).splitlines()), type(cause).__name__)
    return ConfigError(
        f"runtime.compile=true and PyTorch can't compile here ({shown(first)}); provide a C++ "
        "compiler, disk space and, on a GPU, Triton, or use runtime.compile=false"
    )
