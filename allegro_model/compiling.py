"""torch.compile for the blocks of the transformer: one function for all of them, and a way on where it fails.

The blocks differ in their weights only, so that the first one pays for compiling and the others use the result; what
surrounds them stays as it is. No setting of the compiler is changed for others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import Attention
from .dit.blocks import Block
from .errors import first_line
from .memory import is_out_of_memory

log = logging.getLogger(__name__)

_ATTENTION, _REUSE = 5, 6  # places of `attention` and `reuse` among the inputs of a block


class _Outside:
    """An attention that the compiler leaves alone: kernels gain nothing from it, and hosts hand over another object each time, for
    each of which it would compile anew."""

    kernel: Attention | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        assert self.kernel is not None
        return self.kernel(*inputs, **options)


class CompiledBlocks:
    """Runs blocks through the compiler. A failure, which may come as late as the first call, ends that for good.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self.failure = ""  # why the blocks run without the compiler
        self._compiled: Callable[..., Tensor] | None = None
        self._outside = _Outside()
        self._attention: Callable[..., Tensor] = self._outside

    @contextmanager
    def applied(self, blocks: Iterable[Any]) -> Iterator[None]:
        """While this lasts, `blocks` run through the compiler; afterwards nothing of it is left on them."""
        changed = list(blocks)
        for block in changed:
            block.forward = partial(self._run, block)
        try:
            yield
        finally:
            self._outside.kernel = None
            for block in changed:
                del block.forward

    def _run(self, block: Block, *inputs: Any) -> Tensor:
        """`Block.forward`."""
        if self.failure or any(reuse is not None for reuse in inputs[_REUSE:]):  # the compiler cannot follow a cache of attentions
            return Block.forward(block, *inputs)
        try:
            if self._compiled is None:
                # Not when this module is imported: it brings the compiler with it, which takes seconds.
                self._attention = torch.compiler.disable(self._outside.__call__)
                self._compiled = torch.compile(Block.forward, backend=self.backend)
            self._outside.kernel = inputs[_ATTENTION]
            return self._compiled(block, *inputs[:_ATTENTION], self._attention)
        except Exception as error:  # compilers raise types of their own
            if is_out_of_memory(error):
                raise
            output = Block.forward(block, *inputs)  # fails in the same way where it was not the compiler's fault
            self.failure = first_line(getattr(error, "inner_exception", error))  # torch wraps that of a backend
            log.warning("torch.compile failed, so the blocks run without it: %s", self.failure)
            return output
