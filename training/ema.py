"""Averaged weights: what is sampled from, and what later phases start from."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training.parallel import local


class AveragedWeights:
    """The exponential moving average of a model's parameters, in float32, spread over the workers as they are.

    The decay rises to its value as (1 + step) / (10 + step), so that a short training is not an average of where it
    began.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = dict(model.named_parameters())
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone().float() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after this step; the first is 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        trained = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        if trained:
            averages = [local(self.weights[name]) for name in trained]
            torch._foreach_lerp_(averages, [local(self._parameters[name]).float() for name in trained], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights for the length of the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            here, average = local(parameter), local(self.weights[name])
            kept = here.clone()
            here.copy_(average)
            average.copy_(kept)
