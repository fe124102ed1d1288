"""Running a network on a device that holds only a few of its layers at a time.

The weights stay where they are, as a rule mapped from their file. Each layer is brought to the device, and to the dtype
of the run, when it is called, and let go after it; on CUDA the next one is copied while this one computes. The numbers
are those of a network that was moved as a whole. Layers may be any modules: they are moved as `Module.to` would, so that
packed weights stay packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

Slots = tuple[dict[str, Any], dict[str, Any]]  # parameters and buffers of one module


class AtOnce:
    """Brings layers when they are needed, and not before."""

    ahead = False

    def bring(self, modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
        """Puts copies of the weights of `modules` on `device`; returns what `wait` takes."""
        for module in modules:
            _apply(module, lambda x: x.to(device, dtype if x.is_floating_point() else None))

    def wait(self, arrived: Any) -> None:
        """Makes what is computed from now on wait for a layer."""

    def computed(self) -> None:
        """A layer was called; what it computes may still be under way."""

    def finish(self) -> None:
        """Waits until all that was computed is done."""


class WhileComputing(AtOnce):
    """Brings the next layer on a stream of its own, through page-locked memory, while CUDA computes.

    A layer's memory belongs to that stream. It is given away again at the earliest to a copy that waits for the end of
    the layer, so that never more than two layers are there.
    """

    ahead = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._end: Any = None  # of the layer that was called last

    def bring(self, modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
        """As `AtOnce.bring`, without waiting for the copy."""
        with torch.cuda.stream(self._copies):
            if self._end is not None:
                self._copies.wait_event(self._end)
            for module in modules:
                _apply(module, lambda x: x.pin_memory() if x.device.type == "cpu" else x)
                _apply(module, lambda x: x.to(device, non_blocking=True))
                _apply(module, lambda x: x.to(dtype) if x.is_floating_point() else x)
            return self._copies.record_event()

    def wait(self, arrived: Any) -> None:
        """On the stream that computes, not here."""
        torch.cuda.current_stream(self._device).wait_event(arrived)

    def computed(self) -> None:
        """Marks the place on the stream that computes."""
        self._end = torch.cuda.current_stream(self._device).record_event()

    def finish(self) -> None:
        """Before memory of the other stream is given back for good."""
        torch.cuda.current_stream(self._device).synchronize()


class Streamed:
    """While this context lasts, a network runs on `device` in `dtype` with few of its layers there.

    Afterwards it is as it was, also when something was raised: nothing of it is left on the device.

    Args:
        network: whose weights to leave where they are.
        layers: parts of it that are called one after the other. A module belongs to the first that it is part of. What is
            in no layer stays on the device for as long as the context lasts.
        device, dtype: of the run.
        transfer: how layers get there; default what the device is best at.
    """

    def __init__(self, network: nn.Module, layers: Iterable[nn.Module], device: torch.device, dtype: torch.dtype, *,
                 transfer: AtOnce | None = None) -> None:
        self._layers = list(layers)
        self._device, self._dtype = device, dtype
        self._transfer = transfer or (WhileComputing(device) if device.type == "cuda" else AtOnce())
        seen: set[nn.Module] = set()
        self._modules = [[m for m in layer.modules() if not (m in seen or seen.add(m))]  # type: ignore[func-returns-value]
                         for layer in self._layers]
        self._rest = [m for m in network.modules() if m not in seen]
        self._there: dict[int, tuple[list[tuple[nn.Module, Slots]], Any]] = {}  # layer -> what it was before, when it arrives
        self._follows: dict[int, int] = {i: i + 1 for i in range(len(self._layers) - 1)}  # learned from the calls
        self._last: int | None = None
        self._undo: list[Any] = []

    def __enter__(self) -> Streamed:
        try:
            saved = _save(self._rest)
            self._undo.append(lambda: _restore(saved))
            AtOnce().bring(self._rest, self._device, self._dtype)
            # Not when this module is imported: it brings the compiler with it, which takes seconds.
            before, after = (torch.compiler.disable(call) for call in (self._before, self._after))
            for i, layer in enumerate(self._layers):
                self._undo += [layer.register_forward_pre_hook(lambda *_, i=i: before(i)).remove,
                               layer.register_forward_hook(lambda *_, i=i: after(i)).remove]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._transfer.finish()
        finally:
            for i in list(self._there):
                self._release(i)
            while self._undo:
                self._undo.pop()()

    def _before(self, i: int) -> None:
        if self._last is not None:
            self._follows[self._last] = i
        if i not in self._there:
            for other in list(self._there):
                self._release(other)
            self._bring(i)
        self._transfer.wait(self._there[i][1])

    def _after(self, i: int) -> None:
        self._last = i
        for other in list(self._there):
            if other != i or not self._transfer.ahead:
                self._release(other)
        following = self._follows.get(i)
        if self._transfer.ahead and following is not None and following != i:
            self._bring(following)
        self._transfer.computed()

    def _bring(self, i: int) -> None:
        saved = _save(self._modules[i])
        self._there[i] = (saved, None)  # noted first: a copy that fails half-way must be undone
        self._there[i] = (saved, self._transfer.bring(self._modules[i], self._device, self._dtype))

    def _release(self, i: int) -> None:
        _restore(self._there.pop(i)[0])


def layers_of_dit(dit: Any) -> Iterator[nn.Module]:
    """The layers of a transformer as it calls them: what projects the prompt, once in a run, then the blocks."""
    for block in dit.transformer_blocks:
        yield from (block.attn2.to_k, block.attn2.to_v)
    yield from dit.transformer_blocks


def streamed_bytes(network: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """What `Streamed` needs on the device for weights: all that is in no layer, and the two largest layers."""
    seen: set[nn.Module] = set()
    sizes = []
    for layer in layers:
        own = [m for m in layer.modules() if m not in seen]
        seen.update(own)
        sizes.append(_bytes(own, dtype))
    return _bytes([m for m in network.modules() if m not in seen], dtype) + sum(sorted(sizes)[-2:])


def whole_bytes(network: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """What a network will need on the device for weights if it is moved as a whole: nothing for what is there already."""
    return _bytes(network.modules(), dtype, device)


def _bytes(modules: Iterable[nn.Module], dtype: torch.dtype, there: torch.device | None = None) -> int:
    found = {id(x): x for module in modules for x in (*module._parameters.values(), *module._buffers.values()) if x is not None}
    return sum(x.numel() * (dtype.itemsize if x.is_floating_point() else x.element_size()) for x in found.values()
               if there is None or not _is_there(x, there, dtype))


def _is_there(x: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    return x.device.type == device.type and (x.dtype == dtype or not x.is_floating_point())


def _save(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Slots]]:
    """Notes the weights of modules, and puts others in their place that may be changed and share their memory."""
    saved: list[tuple[nn.Module, Slots]] = []
    for module in modules:
        saved.append((module, (dict(module._parameters), dict(module._buffers))))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    return saved


def _restore(saved: Iterable[tuple[nn.Module, Slots]]) -> None:
    for module, (parameters, buffers) in saved:
        module._parameters.update(parameters)
        module._buffers.update(buffers)


def _apply(module: nn.Module, change: Any) -> None:
    """`change` for the weights of one module, without its children; what a module does on its own when moved, it does."""
    module._apply(change, recurse=False)
