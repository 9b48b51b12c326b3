"""The averaged weights. Samples are made with them, and later phases start from them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training.loop.parallel import local_tensor


class ExponentialMovingAverage:
    """The exponential moving average of a model's parameters, in float32, sharded over the workers as they are.

    The decay rises to its value as (1 + step) / (10 + step), so that the average of a short training is not dominated
    by its first weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = dict(model.named_parameters())
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone().float() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the parameters after `step`, counted from 1, to the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        trained = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        if trained:
            averages = [local_tensor(self.weights[name]) for name in trained]
            parameters = [local_tensor(self._parameters[name]).float() for name in trained]
            torch._foreach_lerp_(averages, parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averaged weights into the model until the context ends."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            current, average = local_tensor(parameter), local_tensor(self.weights[name])
            kept = current.clone()
            current.copy_(average)
            average.copy_(kept)
