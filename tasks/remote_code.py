"""Code that comes along with weights: run only when a recipe names it by its hash."""

import hashlib

from tasks import weights
from tasks.stage import MissingBackend


def digest(name: str) -> str:
    """12 hex digits over the Python files in a network's folder. Raises MissingBackend."""
    folder, whole = weights.find(name), hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        whole.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:12]


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
