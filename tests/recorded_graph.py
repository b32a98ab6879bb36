"""CUDA graphs on a CPU: what is captured is done again, one by one, in the same memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_iter

# New memory, whose content nobody reads.
_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def _memory(values: Any) -> set[int]:
    tensors = (each for each in tree_iter(values) if isinstance(each, Tensor))
    return {each.untyped_storage().data_ptr() for each in tensors}


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`; as there, numbers that Python reads stay the same."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Callable[[], None]] = []
        self.kept: list[Any] = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """Record what this thread does from now on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def capture_end(self) -> None:
        """Record no more."""
        if self not in _get_current_dispatch_mode_stack():
            raise RuntimeError("nothing is recorded")
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        words = kwargs or {}
        made = func(*args, **words)
        self.kept.append((args, words, made))
        name = func.overloadpacket.__name__
        changes = func._schema.is_mutable
        if name in _EMPTY or name == "_local_scalar_dense":
            return made
        if not changes and _memory(made) <= _memory((args, words)):  # a view
            return made

        def again() -> None:
            new = func(*args, **words)
            if not changes:
                for old, value in zip(tree_iter(made), tree_iter(new), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(value)

        self.operations.append(again)
        return made

    @torch.no_grad()
    def replay(self) -> None:
        """Do again what was recorded."""
        for operation in self.operations:
            operation()


@contextmanager
def recording() -> Iterator[None]:
    """Let graphs be recorded in place of being captured, and views be made as on a GPU."""

    def as_compiled() -> bool:
        return str(sys._getframe(1).f_globals["__name__"]).startswith("moco_dist.")

    def zeros(*size: Any, pin_memory: bool = False, **words: Any) -> Tensor:
        return plain_zeros(*size, **words)

    idle, plain_zeros = mock.Mock(), torch.zeros
    names = "Stream", "Event", "current_stream", "synchronize", "graph_pool_handle"
    others = dict.fromkeys(names, idle)
    graphs = mock.patch.multiple(
        torch.cuda, CUDAGraph=RecordedGraph, stream=lambda _: nullcontext(), **others
    )
    compiled = mock.patch.object(torch.compiler, "is_compiling", as_compiled)
    with graphs, compiled, mock.patch.object(torch, "zeros", zeros):
        yield
