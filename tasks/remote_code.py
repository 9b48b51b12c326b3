"""Code that comes along with weights: run only when a recipe names it by its hash."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tasks import weights
from tasks.stage import MissingBackend


def digest(name: str) -> str:
    """12 hex digits over the Python files in a network's folder, and over what its configurations would have run.

    Raises MissingBackend, also where that is code from somewhere else: of another place in the hub or on the disk, or
    not there.
    """
    folder, whole = weights.find(name), hashlib.sha256()
    code = sorted(folder.rglob("*.py"))
    for path in code:
        whole.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for path, reference in _references(folder):
        if "--" in reference or folder / f"{reference.rpartition('.')[0]}.py" not in code:
            raise MissingBackend(
                f"{path} would have {reference} run, which is not among the code beside the weights of {name}; get the "
                f"published files again. {weights.published(name).instead} serves without"
            )
        whole.update(f"{path.name} {reference}\n".encode())
    return whole.hexdigest()[:12]


def _references(folder: Path) -> Iterator[tuple[Path, str]]:
    """Which code the configurations in a folder name, as "module.Class"."""
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text()).get("auto_map", {})
        except (OSError, ValueError, AttributeError):  # no configuration, or one that the loader will refuse
            continue
        for value in found.values() if isinstance(found, dict) else ():
            yield from ((path, each) for each in (value if isinstance(value, list) else [value]) if each)


def check(name: str, setting: str, trusted: str) -> None:
    """See that a recipe trusts exactly the code that lies beside the weights.

    name: the network's, in the catalogue. setting: the recipe's word for it, such as "aesthetics.remote_code"; trusted:
    what the recipe says there. Raises MissingBackend.
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
        f"{name} comes with Python code of its own, in {weights.find(name)}; {why}. Read the files there, and to run "
        f"them write `{setting.rpartition('.')[2]}: {found}` into the recipe's {setting.partition('.')[0]}; "
        f"{weights.published(name).instead} serves without"
    )
