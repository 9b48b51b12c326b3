"""The result of a stage for a clip, as it is stored: columns in the ledger, arrays and files in the run's storage."""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from data_manifests.storage import Storage, store_access
from tasks.media.clip import ClipRecord, Measurement, Value

Content = TypeVar("Content")

# files of a stage that remakes the clip: the new video and the new audio
_VIDEO, _AUDIO = "mp4", "flac"


class DamagedFile(ValueError):
    """A file that should hold an array and cannot be read as one. The message names the file."""


@dataclass(frozen=True)
class StageResult:
    """A stage's row for a clip, one without an error, and the names of the arrays and files stored with it."""

    stage: str
    fingerprint: str
    """Rows of this fingerprint hold it, and its files lie in this fingerprint's folder."""
    columns: dict[str, Value]
    """The values of the columns that the stage declares."""
    arrays: tuple[str, ...] = ()
    """Names of the stored arrays, sorted."""
    arrays_bytes: int = 0
    """Size of the arrays' files together."""
    files: tuple[str, ...] = ()
    """Names of the stored files, with extension, sorted."""
    files_bytes: int = 0
    """Size of the files together."""

    @classmethod
    def of(cls, stage: str, fingerprint: str, row: Mapping[str, Any], columns: Mapping[str, type]) -> "StageResult":
        """The result that a row of the stage's table holds. columns: those that the stage declares."""
        return cls(
            stage,
            fingerprint,
            {name: row.get(name) for name in columns},  # None for a column that is newer than the row
            tuple(row["arrays"]),
            row["arrays_bytes"],
            tuple(row.get("files") or ()),
            row.get("files_bytes") or 0,
        )

    def row(self) -> dict[str, Any]:
        """The result as columns of a row of the stage's table. `of` is the inverse."""
        return {
            **self.columns,
            "arrays": list(self.arrays),
            "arrays_bytes": self.arrays_bytes,
            "files": list(self.files),
            "files_bytes": self.files_bytes,
        }

    def measurement(self, storage: Storage, clip_id: str) -> Measurement:
        """The whole measurement. Each array and file is read from the storage when it is first asked for.

        Reading raises StoreError when the store does not answer, FileNotFoundError when the file is gone, and
        DamagedFile when it holds no array.
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
        """The clip as this stage has remade it: with the stage's video, size and audio, where it gives them."""
        video = file_name(self.stage, self.fingerprint, record.clip_id, _VIDEO)
        audio = file_name(self.stage, self.fingerprint, record.clip_id, _AUDIO)
        if _VIDEO in self.files:
            width, height = self.columns["width"], self.columns["height"]
            assert isinstance(width, int) and isinstance(height, int)
            record = dataclasses.replace(record, width=width, height=height, video=video)
        if _AUDIO in self.files:
            record = dataclasses.replace(record, audio=audio)
        # an upper bound: the files that are replaced still count
        return dataclasses.replace(record, bytes=record.bytes + self.files_bytes)

    def sample_files(self, clip_id: str) -> dict[str, str]:
        """The files that go into a sample beside video and audio: their names in the storage, by extension."""
        names = [f"{array}.npy" for array in self.arrays] + [f for f in self.files if f not in (_VIDEO, _AUDIO)]
        return {name: file_name(self.stage, self.fingerprint, clip_id, name) for name in names}


class _Stored(Mapping[str, Content], Generic[Content]):
    """Contents by name. Each is read on first use and then kept."""

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
    """The name in the run's storage of a stage's file for a clip. An array `x` is the file `x.npy`."""
    return f"features/{stage}/{fingerprint}/{clip_id}.{name}"


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file, without pickled objects."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
