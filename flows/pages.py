"""Self-contained HTML pages: everything inside, nothing fetched, nothing from a file's name taken for markup."""

import base64
from pathlib import Path
from typing import Any


def render(template: str, **context: Any) -> bytes:
    """A page from flows/templates, UTF-8. Every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # names of files may hold bytes that are no text
    return environment.get_template(template).render(**context).encode("utf-8", "replace")


def data_uri(data: bytes, kind: str) -> str:
    """A file inside a page. kind: its media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def short(value: str) -> str:
    """A score's value as decisions tell it, without digits that nobody reads."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value or "no value"
