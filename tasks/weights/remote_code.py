"""Python code that is published with weights. It runs only when the recipe names its hash."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend


def digest(name: str) -> str:
    """12 hex digits over the Python files in a network's folder, and over the classes that its configurations name.

    Raises MissingBackend when weights are missing, and when a configuration names code outside the folder: in another
    repository of the hub, elsewhere on the disk, or in a file that does not exist.
    """
    folder, combined = weights.find(name), hashlib.sha256()
    code = sorted(folder.rglob("*.py"))
    for path in code:
        combined.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for path, reference in _references(folder):
        if "--" in reference or folder / f"{reference.rpartition('.')[0]}.py" not in code:
            raise MissingBackend(
                f"{path} asks to run {reference}, which is not among the code beside the weights of {name}; get the "
                f"published files again. {weights.published(name).instead} serves without"
            )
        combined.update(f"{path.name} {reference}\n".encode())
    return combined.hexdigest()[:12]


def _references(folder: Path) -> Iterator[tuple[Path, str]]:
    """The code that the configurations in a folder name: the configuration, and "module.Class"."""
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text()).get("auto_map", {})
        except (OSError, ValueError, AttributeError):  # not a configuration, or one that the loader will refuse
            continue
        for value in found.values() if isinstance(found, dict) else ():
            yield from ((path, each) for each in (value if isinstance(value, list) else [value]) if each)


def check(name: str, setting: str, trusted: str) -> None:
    """Check that a recipe trusts exactly the code that lies beside the weights.

    name: the network's name in the catalogue. setting: the recipe's key for it, such as "aesthetics.remote_code".
    trusted: the value of that key. Raises MissingBackend.
    """
    found = digest(name)
    if trusted == found:
        return
    why = (
        f"{setting} trusts {trusted}, and the code there is {found}: it has changed"
        if trusted
        else "it runs only when you say so"
    )
    raise MissingBackend(
        f"{name} comes with Python code of its own, in {weights.find(name)}; {why}. Read the files there. To run them, "
        f"write `{setting.rpartition('.')[2]}: {found}` into the recipe's {setting.partition('.')[0]}. "
        f"{weights.published(name).instead} serves without"
    )
