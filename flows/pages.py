"""Self-contained HTML pages: everything inside, nothing fetched, nothing from a file's name taken for markup."""

import base64
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_manifests.storage import Storage
from tasks.run_folder import Refused

if TYPE_CHECKING:
    from jinja2 import Template


def render(template: str, **context: Any) -> bytes:
    """A page from flows/templates, UTF-8. Every value is escaped."""
    # names of files may hold bytes that are no text
    return _template(template).render(**context).encode("utf-8", "replace")


def write_page(path: Path, template: str, **context: Any) -> None:
    """`render` into a file, part by part: where a value is an iterator, only one of its items is held at a time. The
    file appears whole or not at all."""
    stream = _template(template).stream(**context)
    Storage(str(path.parent)).write(path.name, lambda beside: stream.dump(str(beside), "utf-8", "replace"))


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written, before any work is done for it. Raises Refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (FileExistsError, NotADirectoryError):
        raise Refused(f"{path} cannot be written: {path.parent} is, or lies in, a file; give another place") from None
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror or error}; give another place") from None


def _template(name: str) -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def data_uri(data: bytes, kind: str) -> str:
    """A file inside a page. kind: its media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def short(value: str) -> str:
    """A score's value as decisions tell it, without digits that nobody reads."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value or "no value"
