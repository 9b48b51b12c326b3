"""What the loader's tests share."""

from itertools import islice
from pathlib import Path
from typing import Any

from training.batch import Batch
from training.loader import Loader


def loader(folder: Path | str, **options: Any) -> Loader:
    defaults: dict[str, Any] = {"tiers": ("main", "hq"), "frames": (33,), "batch": 8, "text_tokens": 8}
    return Loader(f"{folder}/dataset.json", **(defaults | options))


def take(loaded: Loader, count: int) -> list[Batch]:
    return list(islice(loaded, count))
