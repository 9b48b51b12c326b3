"""The measuring stages, by the names that recipes call them."""

import typing
from collections.abc import Iterable
from typing import Any

from tasks.aesthetics import Aesthetics
from tasks.crop import Crop
from tasks.duplicates import Duplicates
from tasks.guidance import GuidanceStage
from tasks.identity import Identity
from tasks.latents import Latents
from tasks.motion import Motion
from tasks.people import People
from tasks.pose import Pose
from tasks.speech import Speech
from tasks.stage import Stage, StageSettings
from tasks.subtitles import Subtitles
from tasks.sync import Sync

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
    """The stages of a recipe, in its order, that a stage's measurement starts from: those whose findings it takes, and
    those that remake the clip."""
    order, stage = list(measure), STAGES[name]
    takes = (*stage.needs, *stage.uses)
    return [other for other in order[: order.index(name)] if other in takes or STAGES[other].remakes_clip]


def settings_type(stage: type[Stage[Any]]) -> type[StageSettings]:
    """The settings that a stage is built from: `MotionSettings` of `class Motion(Stage[MotionSettings])`."""
    for base in getattr(stage, "__orig_bases__", ()):
        if typing.get_origin(base) is Stage:
            return typing.cast(type[StageSettings], typing.get_args(base)[0])
    raise TypeError(f"{stage.__name__} does not name its settings: derive it from Stage[ItsSettings]")
