"""The measuring stages, by the names that recipes call them."""

import typing
from typing import Any

from tasks.duplicates import Duplicates
from tasks.motion import Motion
from tasks.people import People
from tasks.speech import Speech
from tasks.stage import Stage, StageSettings

STAGES: dict[str, type[Stage[Any]]] = {stage.name: stage for stage in (People, Duplicates, Motion, Speech)}


def settings_type(stage: type[Stage[Any]]) -> type[StageSettings]:
    """The settings that a stage is built from: `MotionSettings` of `class Motion(Stage[MotionSettings])`."""
    for base in getattr(stage, "__orig_bases__", ()):
        if typing.get_origin(base) is Stage:
            return typing.cast(type[StageSettings], typing.get_args(base)[0])
    raise TypeError(f"{stage.__name__} does not name its settings: derive it from Stage[ItsSettings]")
