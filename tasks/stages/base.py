"""The contract of a measuring stage: settings in, one measurement a clip out.

A stage does not know how it is run, where its rows are kept or which thresholds are applied to them.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationInfo, field_validator, model_validator

from data_manifests.strict import Strict, nearest
from tasks.media.clip import Clip, Measurement
from tasks.stages.backend import Backend

MAX_ASPECT = 8
"""Longer side of a frame over its shorter side. Stages that scale the shorter side to a fixed length refuse clips above
it, because their cost grows with this ratio."""


class StageSettings(Strict):
    """What a recipe says about one stage: the backend, and the settings that change a measurement."""

    choices: ClassVar[Mapping[str, Collection[str]]] = {}
    """The backends of each field that chooses one: the backends by name, or their names alone. A backend's `defaults`
    are applied only where the field `backend` has the backends by name here."""
    operational: ClassVar[Any] = None
    """Settings that change no measurement, such as the address of a server, in the form of pydantic's `exclude`. They
    stay out of the fingerprint."""

    backend: str
    """The name of the backend that measures, one of `choices`."""

    @model_validator(mode="before")
    @classmethod
    def _apply_backend_defaults(cls, given: Any) -> Any:
        known = cls.choices.get("backend")
        if not isinstance(given, dict) or not isinstance(known, Mapping):
            return given
        backend = known.get(given.get("backend")) if isinstance(given.get("backend"), str) else None
        return given if backend is None else {**backend.defaults, **given}

    @field_validator("*")
    @classmethod
    def _check_backend_name(cls, value: Any, info: ValidationInfo) -> Any:
        known = cls.choices.get(str(info.field_name))
        if known is not None and value not in known:
            raise ValueError(f"unknown backend {value!r}{nearest(value, list(known))}")
        return value


Settings = TypeVar("Settings", bound=StageSettings)


class Stage(ABC, Generic[Settings]):
    """A measuring stage."""

    name: ClassVar[str]
    """The stage's name in recipes, ledger tables and rules."""
    version: ClassVar[int]
    """Raised by one whenever a change of the code changes a measurement."""
    columns: ClassVar[dict[str, type]]
    """The columns of its rows and their types: float, int, bool or str."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of the manifest that the measurement depends on, such as "caption"."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Earlier stages whose results it cannot do without. `Clip.found` holds these results."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Earlier stages whose results it uses if the recipe has them. `Clip.found` holds these results."""
    backends: ClassVar[Mapping[str, Mapping[str, type[Backend]]]] = {}
    """The registries of its backends, by the field of the settings that chooses from each."""
    unaligned: ClassVar[tuple[str, ...]] = ()
    """Names of arrays that do not have one entry a frame."""
    remakes_clip: ClassVar[bool] = False
    """Whether it replaces the clip, for all later stages and in the shards. Its file `mp4` is the new picture, of the
    size in the columns `width` and `height`. Its file `flac` is the new sound."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    def needed(cls, settings: Settings) -> tuple[str, ...]:
        """The earlier stages that it cannot do without under these settings; `needs` unless overridden."""
        return cls.needs

    def chosen(self) -> list[type[Backend]]:
        """The backends that its settings choose."""
        return [known[getattr(self.settings, field)] for field, known in self.backends.items()]

    def networks(self) -> tuple[str, ...]:
        """The published weights that its chosen backends need, by name."""
        return tuple(dict.fromkeys(name for backend in self.chosen() for name in backend.networks))

    def library_version(self) -> str:
        """The libraries that the stage itself computes with, whatever the backend, if they can change a number."""
        return ""

    def backend_version(self) -> str:
        """The part of the fingerprint about backends and libraries; "" where all the code is the stage's own."""
        versions = [*(backend.version() for backend in self.chosen()), self.library_version()]
        return ", ".join(version for version in versions if version)

    def check(self) -> None:
        """Check that the chosen backends can run, before any work starts. Raises MissingBackend."""
        for backend in self.chosen():
            backend.check(self.settings)

    @abstractmethod
    def measure(self, clip: Clip) -> Measurement:
        """Measure one clip. Raises Unmeasurable, or any other error: each becomes an error row."""


def fingerprint(name: str, version: object, backend_version: str, settings: Strict, upstream: str = "") -> str:
    """Identify what a row was made with: 12 hex digits over stage, versions and settings.

    Whatever changes a number changes the fingerprint, so rows under one fingerprint can be compared and reused.
    `upstream` is the fingerprint of the stage whose rows this one starts from; "" if it starts from none.
    """
    made_with = {
        "stage": name,
        "version": version,
        "backend_version": backend_version,
        "settings": settings.model_dump(mode="json", exclude=getattr(settings, "operational", None)),
        "upstream": upstream,
    }
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]
