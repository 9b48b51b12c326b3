"""Typed sections of a recipe: unknown keys refused, with the nearest match and where they stand."""

import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what to do."""


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys and never changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Section = TypeVar("Section", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML mapping. Raises RecipeError naming the file, and the line where the syntax breaks."""
    try:
        # a subclass of PyYAML's SafeLoader
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)  # noqa: S506
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    # a date that no calendar has is a ValueError, brackets without end a RecursionError
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is {type(content).__name__}")
    return content


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently take the last."""

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
    """Validate `content` as `model`. Raises RecipeError with one line a fault, each naming `where` and the key."""
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
    known = _fields_at(model, fault["loc"][:-1])
    return f"{key}: {unknown_key(str(fault['loc'][-1]), known)}"


def unknown_key(key: str, known: list[str]) -> str:
    """The message for a key that is not one of `known`: the nearest match, or all of them."""
    return f"unknown key {key!r}{nearest(key, known)}"


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about a `word` that is not one of `known`: the nearest match, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(sorted(known)) or 'nothing'}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model nested at `location`, as far as the annotations lead."""
    here: Any = model
    for part in location:
        while not (isinstance(here, type) and issubclass(here, BaseModel)):
            arguments = [a for a in typing.get_args(here) if a is not type(None)]
            if not arguments:
                return []
            is_mapping = typing.get_origin(here) in (dict, list, tuple)
            here = arguments[-1] if is_mapping else arguments[0]
            if is_mapping:
                break
        else:
            here = here.model_fields[str(part)].annotation if str(part) in here.model_fields else None
    while here is not None and not (isinstance(here, type) and issubclass(here, BaseModel)):
        arguments = [a for a in typing.get_args(here) if a is not type(None)]
        if not arguments or typing.get_origin(here) not in (dict, list, tuple, types.UnionType, typing.Union):
            return []
        here = arguments[-1] if typing.get_origin(here) is dict else arguments[0]
    return list(here.model_fields) if here is not None else []
