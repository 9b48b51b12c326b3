"""A learner's model with new weights, as a phase of one worker gets it."""

from typing import Any

from torch import nn

from training.loop.job import Learner
from training.loop.parallel import WorkerGroup, parallelize


def new_model(learner: Learner) -> Any:
    def fill(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(learner.new_weight(model, name))

    return parallelize(learner.model(), WorkerGroup(), "ddp", [], fill)
