"""A computation of tensors, compiled once for every shape and given its weights with each call.

One program serves all products whose students are built alike, so a new version or one more product compiles
nothing. Until its compiled form is there, and where there never is one, it computes eagerly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

_TIMED = 5

State = Mapping[str, Tensor]
Tensors = tuple[Tensor, ...]


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters and buffers by name, without copying them."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


class Program:
    """One computation for all networks of one build.

    Args:
        network: Of this build; any of them does.
        compute: What is computed with it: takes the network and the inputs, returns tensors. Its Python runs once
            per shape, so it may not depend on values.
    """

    def __init__(self, network: nn.Module, compute: Callable[..., Tensors]) -> None:
        self._network = _Computation(network, compute)
        self._compiled: dict[tuple[torch.Size, ...], Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, network: nn.Module, state: State, inputs: Tensors) -> Tensors:
        """Compute for one network.

        Args:
            network: Of this program's build.
            state: Its `state_of`.
            inputs: The computation's.
        """
        compiled = self._compiled.get(_shapes(inputs))
        if compiled is None:
            return self._network.compute(network, *inputs)
        return tuple(compiled(*state.values(), *inputs))

    def is_compiled(self, inputs: Tensors) -> bool:
        """Whether these inputs' shapes have their compiled form."""
        return _shapes(inputs) in self._compiled

    def compile(self, state: State, inputs: Tensors) -> None:
        """Compile for one thread and the shapes of `inputs`; calls go on meanwhile. Only what is faster is kept.

        Args:
            state: Of a network of this build.
            inputs: Examples; only shapes, types and layouts count.

        Raises:
            Exception: Whatever the compiler meets; what is there stays as it is.
        """
        names = list(state)

        def flat(*tensors: Tensor) -> Tensors:
            given = {f"network.{name}": tensor for name, tensor in zip(names, tensors, strict=False)}
            return functional_call(self._network, given, tensors[len(names) :])

        arguments = (*state.values(), *inputs)
        with torch.no_grad():
            graph = make_fx(flat)(*arguments)
            options = {"cpp.threads": 1, "compile_threads": 1}
            compiled = torch._inductor.compile(graph, list(arguments), options=options)
            # What the compiler makes of gathers is slower at times than what it replaces.
            eager_s = _seconds(lambda: self._network(*inputs))
            compiled_s = _seconds(lambda: compiled(*arguments))
        if compiled_s < eager_s:
            self._compiled[_shapes(inputs)] = compiled


class _Computation(nn.Module):
    def __init__(self, network: nn.Module, compute: Callable[..., Tensors]) -> None:
        super().__init__()
        self.network = network
        self.compute = compute

    def forward(self, *inputs: Tensor) -> Tensors:
        return self.compute(self.network, *inputs)


def _seconds(call: Callable[[], object]) -> float:
    """The processor time of a call: of this thread alone, whatever the others do."""
    seconds = []
    for _ in range(_TIMED):
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return min(seconds)


def _shapes(inputs: Tensors) -> tuple[torch.Size, ...]:
    return tuple(each.shape for each in inputs)
