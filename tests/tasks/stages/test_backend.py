"""The contract of backends: every backend of every stage keeps it, and a wrong name is refused."""

from typing import Any, ClassVar

import pytest

from data_manifests.strict import RecipeError, validate
from tasks.stages.backend import Backend
from tasks.stages.base import Stage, StageSettings
from tasks.stages.registry import STAGES, settings_type
from tasks.weights.catalogue import CATALOGUE
from tasks.weights.missing import MissingBackend

CHOICES = [(stage, field) for stage in STAGES.values() for field in stage.backends]
BACKENDS = [(stage, field, name) for stage, field in CHOICES for name in stage.backends[field]]


def label(value: Any) -> str:
    return value.name if isinstance(value, type) else str(value)


def test_every_stage_has_a_backend_to_choose() -> None:
    for stage in STAGES.values():
        assert stage.backends.get("backend"), stage.name


@pytest.mark.parametrize(("stage", "field", "name"), BACKENDS, ids=label)
def test_every_backend_keeps_the_contract(stage: type[Stage[Any]], field: str, name: str) -> None:
    backend = stage.backends[field][name]
    assert issubclass(backend, Backend)
    assert not getattr(backend, "__abstractmethods__", None)
    assert isinstance(backend.networks, tuple) and set(backend.networks) <= set(CATALOGUE)
    resources = backend.resources
    assert resources.cpus > 0
    assert 0 <= resources.gpu <= 1
    assert resources.memory_gb > 0
    assert resources.batch >= 1


@pytest.mark.parametrize(("stage", "field"), CHOICES, ids=label)
def test_the_settings_know_the_backends_of_the_stage(stage: type[Stage[Any]], field: str) -> None:
    settings = settings_type(stage)
    assert list(settings.choices) == list(stage.backends)
    assert list(settings.choices[field]) == list(stage.backends[field])
    assert settings.model_fields[field].default in stage.backends[field]


@pytest.mark.parametrize(("stage", "field"), CHOICES, ids=label)
def test_an_unknown_backend_is_refused_with_the_nearest_name(stage: type[Stage[Any]], field: str) -> None:
    for name in stage.backends[field]:
        wrong = f"{name}_"
        with pytest.raises(RecipeError, match=rf"{field}: unknown backend '{wrong}'; did you mean '{name}'\?"):
            validate(settings_type(stage), {field: wrong}, "here")


@pytest.mark.parametrize(
    ("stage", "field", "name"), [row for row in BACKENDS if row[0].backends[row[1]][row[2]].defaults], ids=label
)
def test_defaults_of_a_backend_are_applied_where_a_recipe_names_it(
    stage: type[Stage[Any]], field: str, name: str
) -> None:
    defaults, settings = stage.backends[field][name].defaults, settings_type(stage)
    # Only the field `backend` applies them, only with the registry at hand, and only where a recipe names the backend.
    assert field == "backend" and settings.choices[field] is stage.backends[field]
    assert name != settings.model_fields[field].default
    plain, chosen = settings(backend=settings.model_fields["backend"].default), settings(backend=name)
    for key, value in defaults.items():
        assert getattr(chosen, key) == value != getattr(plain, key)
        given = getattr(plain, key)
        assert getattr(settings(**{"backend": name, key: given}), key) == given


def test_networks_of_a_stage_are_those_of_its_chosen_backends() -> None:
    sync = STAGES["sync"]
    settings = settings_type(sync)
    assert sync(settings(backend="lips")).networks() == ()
    assert sync(settings(backend="syncnet", faces="s3fd")).networks() == ("syncnet", "s3fd")


class Weighty(Backend):
    """Needs weights and reports a version."""

    networks: ClassVar[tuple[str, ...]] = ("raft",)

    @classmethod
    def version(cls) -> str:
        return "weighty 1"


class Plain(Backend):
    """Needs nothing."""


class TwoChoicesSettings(StageSettings):
    choices: ClassVar = {
        "backend": {"plain": Plain, "weighty": Weighty},
        "second": {"plain": Plain, "weighty": Weighty},
    }

    backend: str = "plain"
    second: str = "plain"


class TwoChoices(Stage[TwoChoicesSettings]):
    name, version = "two choices", 1
    columns: ClassVar[dict[str, type]] = {}
    backends: ClassVar = TwoChoicesSettings.choices

    def library_version(self) -> str:
        return "library 2"

    def measure(self, clip: Any) -> Any:
        raise NotImplementedError


def test_a_version_names_the_chosen_backends_and_the_stages_libraries() -> None:
    assert TwoChoices(TwoChoicesSettings()).backend_version() == "library 2"
    for field in ("backend", "second"):
        assert TwoChoices(TwoChoicesSettings(**{field: "weighty"})).backend_version() == "weighty 1, library 2"


def test_missing_weights_of_a_chosen_backend_are_an_error_before_work_starts(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    TwoChoices(TwoChoicesSettings()).check()
    with pytest.raises(MissingBackend, match="weights of raft are missing"):
        TwoChoices(TwoChoicesSettings(second="weighty")).check()
