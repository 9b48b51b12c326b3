"""HTML pages that are self-contained: they load nothing, and names of files in them cannot become markup."""

import base64
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_manifests.storage import Storage
from tasks.review.refusal import Refused

if TYPE_CHECKING:
    from jinja2 import Template


def render(template: str, **context: Any) -> bytes:
    """Make a page from a template of flows/report/templates. Every value is escaped. Returns UTF-8."""
    # names of files may hold bytes that are not valid text
    return _template(template).render(**context).encode("utf-8", "replace")


def write_page(path: Path, template: str, **context: Any) -> None:
    """Make a page and write it into a file part by part. The file appears whole or not at all.

    A value may be an iterator. Only one of its items is then held in memory at a time.
    """
    stream = _template(template).stream(**context)
    Storage(str(path.parent)).write(path.name, lambda beside: stream.dump(str(beside), "utf-8", "replace"))


def check_writable(path: Path) -> None:
    """Check that a file can be written, and make its folder, before any work is done for it. Raises Refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (FileExistsError, NotADirectoryError):
        raise Refused(
            f"{path} cannot be written: {path.parent} is a file, or lies inside one; give another path"
        ) from None
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror or error}; give another path") from None


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
    """The data: URI of a file, to put it into a page. kind: its media type, such as "image/webp"."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def short(value: str) -> str:
    """The value of a score in decisions, with at most three significant digits; "no value" for ""."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value or "no value"
