"""Typed sections of a recipe. An unknown key is refused, with its place and the nearest known key."""

import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class RecipeError(ValueError):
    """A recipe that cannot be used. The message names the file and the key, and says what to do."""


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys and cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys that this section used to have, each with the key that replaces it. An old key is still refused, but the
    message names its replacement."""


Section = TypeVar("Section", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML file that holds a mapping.

    Raises RecipeError with the file's name, and the line of a syntax error.
    """
    try:
        # a subclass of PyYAML's SafeLoader
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)  # noqa: S506
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    # an impossible date is a ValueError, brackets nested too deep are a RecursionError
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is {type(content).__name__}")
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping. Plain YAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} stands twice in one mapping", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def validate(model: type[Section], content: object, where: str) -> Section:
    """Validate `content` as `model`.

    where: the place of `content`, which begins every line of the error message.

    Raises RecipeError with one line a fault; each line names `where` and the key.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(_describe(model, fault) for fault in error.errors())
        raise RecipeError("\n".join(f"{where}: {line}" for line in faults.splitlines())) from None


def _describe(model: type[BaseModel], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        message = str(fault["msg"]).removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    section = _model_at(model, fault["loc"][:-1])
    name = str(fault["loc"][-1])
    if section is not None and issubclass(section, Strict) and name in section.renamed:
        return f"{key}: unknown key {name!r}; it is now called {section.renamed[name]!r}"
    return f"{key}: {unknown_key(name, list(section.model_fields) if section is not None else [])}"


def unknown_key(key: str, known: list[str]) -> str:
    """The message for a `key` that is not in `known`. It offers the nearest known key, or all of them."""
    return f"unknown key {key!r}{nearest(key, known)}"


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about a `word` that is not in `known`. It offers the nearest known word, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(sorted(known)) or 'nothing'}"


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model nested at `location`. None where the annotations do not lead to one."""
    here: Any = model
    for part in location:
        while not _is_model(here):
            arguments = [a for a in typing.get_args(here) if a is not type(None)]
            if not arguments:
                return None
            is_container = typing.get_origin(here) in (dict, list, tuple)
            here = arguments[-1] if is_container else arguments[0]
            if is_container:
                break
        else:
            here = here.model_fields[str(part)].annotation if str(part) in here.model_fields else None
    while here is not None and not _is_model(here):
        arguments = [a for a in typing.get_args(here) if a is not type(None)]
        if not arguments or typing.get_origin(here) not in (dict, list, tuple, types.UnionType, typing.Union):
            return None
        here = arguments[-1] if typing.get_origin(here) is dict else arguments[0]
    return typing.cast("type[BaseModel] | None", here)


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
