"""What all optimizers of this package share: how a step begins, and state that keeps its types."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ExactStateOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is loaded as it was saved, and can be allocated before the first step.

    ``torch.optim.Optimizer.load_state_dict`` casts every state tensor to the type of its parameter: float32 moments of
    a bfloat16 table would lose their digits, and whole numbers per row would become fractions.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; a closure is called once, before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        """Update every parameter that has a gradient."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Tensors are copied and keep their saved type."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(saved, ours, strict=True):
            loaded = self.state.get(parameter, {})
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    # torch chose the device: counters of steps may stay on the host.
                    loaded[name] = value.detach().to(loaded[name].device, copy=True)

    def allocate_state(self) -> None:
        """Allocate all state as it is before the first step, so that saved state can be written into it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self._allocate(parameter, group)

    def _allocate(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Fill ``self.state[parameter]`` with its state before the first step."""
        raise NotImplementedError
