"""The contract of a measuring stage: settings in, one measurement a clip out.

A stage knows nothing of how it is run, where its rows are kept or what threshold will be put to them.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from data_manifests.strict import Strict, nearest
from tasks.clip import Clip

Value = float | int | bool | str | None


class MissingBackend(RuntimeError):
    """A backend whose library or weights are not here.

    The message names what is missing, where it was looked for, how to get it and which embedded backend would serve.
    """


class Unmeasurable(ValueError):
    """This clip cannot be measured, for the reason given; an error row, never a rejection."""


class StageSettings(Strict):
    """What a recipe says of one stage: the backend, and the settings that change a measurement.

    operational: the few that change none, such as where a server is, in the form of pydantic's `exclude`; they stay out
    of the fingerprint.
    """

    operational: ClassVar[Any] = None

    backend: str


def known_backend(backend: str, backends: Iterable[str]) -> str:
    """`backend`, for a settings' validator. Raises ValueError with the nearest match when it is none of `backends`."""
    known = list(backends)
    if backend not in known:
        raise ValueError(f"unknown backend {backend!r}{nearest(backend, known)}")
    return backend


def with_own_defaults(given: Any, own: Mapping[str, Mapping[str, Any]]) -> Any:
    """What a recipe says of a stage, for a settings' validator before all others, with the defaults of a backend that
    has `own` ones where it says nothing."""
    if not isinstance(given, dict) or given.get("backend") not in list(own):
        return given
    return {**own[given["backend"]], **given}


@dataclass(frozen=True)
class Measurement:
    """What a stage found in one clip.

    columns: the ledger row's values, one for each of the stage's declared columns; None where a value has no meaning
        for this clip (a speech fraction without sound).
    arrays: features stored beside the video, by name; each [frames, ...], aligned to the clip's frames, unless the
        stage lists it among its `unaligned` arrays.
    files: whole files stored beside the video, by name with extension ("plan.json"); their bytes.
    """

    columns: dict[str, Value]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


Settings = TypeVar("Settings", bound=StageSettings)


class Stage(ABC, Generic[Settings]):
    """A measuring stage.

    Class attributes:
        name: the stage's name in recipes, ledger tables and rules.
        version: raised by one whenever a change of the code changes a measurement.
        columns: the declared columns and their types, one of float, int, bool, str.
        reads: names of manifest fields that the measurement depends on (such as "caption").
        needs: earlier stages whose findings it cannot do without; `uses`: whose findings it takes where the recipe has
            them. Both are at hand in `Clip.found`.
        backends: the registries of its backends, by the settings' fields that choose from them. A backend that needs
            published weights names them, as tasks.networks.catalogue does: `networks: ClassVar = ("raft",)`.
        unaligned: names of arrays that do not have one entry a frame.
        remakes_clip: whether its file `mp4`, of the columns `width` and `height`, and its file `flac`, where it gives
            them, take the place of the clip's own picture and sound for all stages after it and in the shards.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    columns: ClassVar[dict[str, type]]
    reads: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ()
    backends: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    unaligned: ClassVar[tuple[str, ...]] = ()
    remakes_clip: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    def needed(cls, settings: Settings) -> tuple[str, ...]:
        """The earlier stages that it cannot do without under these settings; `needs` unless they ask for more."""
        return cls.needs

    def networks(self) -> tuple[str, ...]:
        """The published weights that it needs under its settings, by name; those of the backends that they choose."""
        chosen = (known[getattr(self.settings, name)] for name, known in self.backends.items())
        return tuple(dict.fromkeys(name for backend in chosen for name in getattr(backend, "networks", ())))

    def backend_version(self) -> str:
        """The backend's own version: of its library where that can change a number, and of its weights; "" for a
        backend that is all in the stage's own code."""
        return ""

    def check(self) -> None:
        """See before any work starts that the backend can run. Raises MissingBackend; nothing to see by default."""

    @abstractmethod
    def measure(self, clip: Clip) -> Measurement:
        """Measure one clip. Raises Unmeasurable, or whatever else goes wrong: each becomes an error row."""


def fingerprint(name: str, version: object, backend_version: str, settings: Strict, upstream: str = "") -> str:
    """What a row was made with: 12 hex digits over stage, versions and settings.

    Rows under one fingerprint are comparable and reusable; anything that changes a number changes the fingerprint.
    `upstream` is the fingerprint of the stage whose rows this one starts from, where it starts from rows.
    """
    made_with = {
        "stage": name,
        "version": version,
        "backend_version": backend_version,
        "settings": settings.model_dump(mode="json", exclude=getattr(settings, "operational", None)),
        "upstream": upstream,
    }
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]
