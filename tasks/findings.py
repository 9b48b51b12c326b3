"""What a stage found in a clip, as it is kept: columns in the ledger, arrays and files in the run's storage."""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from data_manifests.storage import Storage
from tasks.clip import ClipRecord
from tasks.engine import store_access
from tasks.stage import Measurement, Value

Content = TypeVar("Content")

_VIDEO, _SOUND = "mp4", "flac"  # the files by which a stage that remakes the clip gives its picture and sound


class DamagedFile(ValueError):
    """An array's file that cannot be read as one; the message names it."""


@dataclass(frozen=True)
class Finding:
    """One stage's row for a clip, with what it takes to read the rest.

    columns: the stage's values. arrays, files: the names of what is kept beside the video, with their sizes together.
    """

    stage: str
    fingerprint: str
    columns: dict[str, Value]
    arrays: tuple[str, ...] = ()
    arrays_bytes: int = 0
    files: tuple[str, ...] = ()
    files_bytes: int = 0

    @classmethod
    def of(cls, stage: str, fingerprint: str, row: Mapping[str, Any], columns: Mapping[str, type]) -> "Finding":
        """From a row of the stage's table. columns: those that the stage declares."""
        return cls(
            stage,
            fingerprint,
            {name: row.get(name) for name in columns},  # a column that is newer than the row has no value
            tuple(row["arrays"]),
            row["arrays_bytes"],
            tuple(row.get("files") or ()),
            row.get("files_bytes") or 0,
        )

    def row(self) -> dict[str, Any]:
        """What `of` reads, for the stage's table."""
        return {
            **self.columns,
            "arrays": list(self.arrays),
            "arrays_bytes": self.arrays_bytes,
            "files": list(self.files),
            "files_bytes": self.files_bytes,
        }

    def measurement(self, storage: Storage, clip_id: str) -> Measurement:
        """The whole measurement; arrays and files are read from the storage when asked for.

        Reading raises StoreError when the store does not answer, FileNotFoundError for a file that is gone, DamagedFile
        for one that holds no array.
        """

        def read(name: str) -> bytes:
            stored = file_name(self.stage, self.fingerprint, clip_id, name)
            with store_access(f"read {stored}"):
                return storage.read_bytes(stored)

        def array(name: str) -> np.ndarray:
            data = read(f"{name}.npy")
            try:
                loaded: np.ndarray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            except (ValueError, EOFError) as error:
                where = file_name(self.stage, self.fingerprint, clip_id, f"{name}.npy")
                raise DamagedFile(f"{where}: {error}") from None
            return loaded

        return Measurement(self.columns, _Stored(self.arrays, array), _Stored(self.files, read))

    def remake(self, record: ClipRecord) -> ClipRecord:
        """The clip as this stage has remade it: with the picture, the size and the sound that it gives."""
        video = file_name(self.stage, self.fingerprint, record.clip_id, _VIDEO)
        sound = file_name(self.stage, self.fingerprint, record.clip_id, _SOUND)
        if _VIDEO in self.files:
            width, height = self.columns["width"], self.columns["height"]
            assert isinstance(width, int) and isinstance(height, int)
            record = dataclasses.replace(record, width=width, height=height, video=video)
        if _SOUND in self.files:
            record = dataclasses.replace(record, audio=sound)
        # at most: what is replaced counts as well
        return dataclasses.replace(record, bytes=record.bytes + self.files_bytes)

    def samples_files(self, clip_id: str) -> dict[str, str]:
        """What goes into a sample beside picture and sound: names in the storage by extension."""
        names = [f"{array}.npy" for array in self.arrays] + [f for f in self.files if f not in (_VIDEO, _SOUND)]
        return {name: file_name(self.stage, self.fingerprint, clip_id, name) for name in names}


class _Stored(Mapping[str, Content], Generic[Content]):
    def __init__(self, names: tuple[str, ...], read: Callable[[str], Content]) -> None:
        self._names, self._read = names, read
        self._known: dict[str, Content] = {}

    def __getitem__(self, name: str) -> Content:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def file_name(stage: str, fingerprint: str, clip_id: str, name: str) -> str:
    """Where a stage's file for a clip is kept in the run's storage; an array `x` is the file `x.npy`."""
    return f"features/{stage}/{fingerprint}/{clip_id}.{name}"


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` in NumPy's own file format, without pickled objects."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
