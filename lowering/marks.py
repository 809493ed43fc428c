"""Names on a profiler's timeline: calls of graphs, operators by how they run, copies.

Off at first, and then a mark costs the host 0.3 us and the GPU nothing. They lie on the host's
timeline, around what it queues: a replay of a captured CUDA graph queues nothing of that, and has
none. Where a profiler follows launches to what they run, names reach the GPU's timeline too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from dak_inductor import options
from dak_inductor.cuda_runtime import address_table
from dak_inductor.cuda_runtime.tier_buffer import TieredBuffer
from dak_inductor.errors import OptionError

Maker = Callable[[str], AbstractContextManager[object]]

PREFIX = "dak"
_NOTHING = nullcontext()


class Marks:
    """The switches of this process. Thread-safe: makers are replaced as a whole."""

    def __init__(self) -> None:
        self._nvtx: bool | None = None
        self._makers: tuple[Maker, ...] | None = None  # None: the environment was not asked yet
        self._recorders: tuple[Maker, ...] = ()

    @property
    def nvtx(self) -> bool:
        """Whether ranges are made; from the environment until `switch` is called.

        Raises OptionError.
        """
        self._current()
        return bool(self._nvtx)

    @property
    def on(self) -> bool:
        """Whether any mark is made."""
        return bool(self._makers if self._makers is not None else self._current())

    def switch(self, on: bool) -> None:
        """NVTX ranges on or off. Raises OptionError where torch has none."""
        if on:
            _check_nvtx()
        self._nvtx = on
        self._makers = (*((nvtx_range,) if on else ()), *self._recorders)

    @contextmanager
    def recorded(self, maker: Maker) -> Iterator[None]:
        """Each mark is made by `maker` too, from any thread."""
        on = self.nvtx
        self._recorders += (maker,)
        self.switch(on)
        try:
            yield
        finally:
            self._recorders = tuple(each for each in self._recorders if each is not maker)
            self.switch(bool(self._nvtx))

    def of(self, kind: str, name: str) -> AbstractContextManager[object]:
        """Around work of this kind: "dak KIND NAME"."""
        makers = self._current()
        return _made(makers, f"{PREFIX} {kind} {name}") if makers else _NOTHING

    def ready(self, text: str) -> AbstractContextManager[object]:
        """The same, of a text that `text_of` gave: for calls that come again and again."""
        makers = self._current()
        return _made(makers, text) if makers else _NOTHING

    def of_buffers(
        self, kind: str, buffers: Iterable[TieredBuffer | None]
    ) -> AbstractContextManager[object]:
        """The same, by the names of what is read."""
        makers = self._current()
        return _made(makers, text_of(kind, buffers)) if makers else _NOTHING

    def of_operands(self, kind: str, operands: Iterable[object]) -> AbstractContextManager[object]:
        """The same; those of the operands that are tiered. Nothing where none is."""
        makers = self._current()
        if not makers:
            return _NOTHING
        names = _names(
            address_table.lookup(each.data_ptr()) for each in operands if isinstance(each, Tensor)
        )
        return _made(makers, f"{PREFIX} {kind} {names}") if names else _NOTHING

    def _current(self) -> tuple[Maker, ...]:
        if self._makers is None:
            self.switch(options.nvtx_by_default())
        return self._makers or ()


class NvtxRange:
    """A range of the calling thread, for Nsight Systems and other tools that follow NVTX. It may be
    entered again, also before it was left."""

    __slots__ = ("_pop", "_push", "_text")

    def __init__(self, text: str) -> None:
        self._text = text
        # torch's own wrappers format the text at each call, which takes as long as the range
        native = getattr(torch._C, "_nvtx", None)
        self._push = native.rangePushA if native else torch.cuda.nvtx.range_push
        self._pop = native.rangePop if native else torch.cuda.nvtx.range_pop

    def __enter__(self) -> None:
        self._push(self._text)

    def __exit__(self, *_: object) -> None:
        self._pop()


nvtx_range = lru_cache(maxsize=4096)(NvtxRange)
"""The range of a text; names come again at each step."""


def text_of(kind: str, buffers: Iterable[TieredBuffer | None]) -> str:
    """Of a mark by the names of what is read."""
    return f"{PREFIX} {kind} {_names(buffers)}"


def _made(makers: tuple[Maker, ...], text: str) -> AbstractContextManager[object]:
    if len(makers) == 1:
        return makers[0](text)
    stack = ExitStack()
    try:
        for maker in makers:
            stack.enter_context(maker(text))
    except BaseException:
        stack.close()
        raise
    return stack


def _names(buffers: Iterable[TieredBuffer | None]) -> str:
    """Modules, where a tensor is a module's weight: "model.layers.0.mlp.up_proj"."""
    labels = (buffer.label.removesuffix(".weight") for buffer in buffers if buffer is not None)
    return " + ".join(dict.fromkeys(labels))


def _check_nvtx() -> None:
    try:
        torch.cuda.nvtx.range_push(PREFIX)
        torch.cuda.nvtx.range_pop()
    except RuntimeError as error:
        raise OptionError(
            f"nvtx: torch {torch.__version__} was built without NVTX; take a build for CUDA, or "
            "dak.trace, which needs none"
        ) from error


MARKS = Marks()
"""Those of this process."""
