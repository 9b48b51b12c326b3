"""The measuring stages, by their names in recipes."""

import typing
from collections.abc import Iterable
from typing import Any

from tasks.stages.aesthetics.stage import Aesthetics
from tasks.stages.base import Stage, StageSettings
from tasks.stages.crop.stage import Crop
from tasks.stages.duplicates import Duplicates
from tasks.stages.guidance.stage import GuidanceStage
from tasks.stages.identity.stage import Identity
from tasks.stages.latents.stage import Latents
from tasks.stages.motion.stage import Motion
from tasks.stages.people.stage import People
from tasks.stages.pose.stage import Pose
from tasks.stages.speech import Speech
from tasks.stages.subtitles.stage import Subtitles
from tasks.stages.sync.stage import Sync

STAGES: dict[str, type[Stage[Any]]] = {
    stage.name: stage
    for stage in (
        People,
        Subtitles,
        Aesthetics,
        Duplicates,
        Motion,
        Identity,
        Sync,
        Crop,
        Speech,
        Pose,
        GuidanceStage,
        Latents,
    )
}


def upstream(measure: Iterable[str], name: str) -> list[str]:
    """The stages that a stage's measurement depends on: those whose results it uses, and those that replace the clip.

    measure: the stages of a recipe, in its order. Returns: stages that come before `name`, in the same order.
    """
    order, stage = list(measure), STAGES[name]
    inputs = (*stage.needs, *stage.uses)
    return [other for other in order[: order.index(name)] if other in inputs or STAGES[other].remakes_clip]


def settings_type(stage: type[Stage[Any]]) -> type[StageSettings]:
    """The class of a stage's settings: `MotionSettings` for `class Motion(Stage[MotionSettings])`."""
    for base in getattr(stage, "__orig_bases__", ()):
        if typing.get_origin(base) is Stage:
            return typing.cast(type[StageSettings], typing.get_args(base)[0])
    raise TypeError(f"{stage.__name__} does not name the class of its settings: derive it from Stage[ItsSettings]")
