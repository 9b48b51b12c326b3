"""Remembers which texts have been met before, also for more texts than memory should hold."""

import hashlib
import sqlite3
from types import TracebackType


class FirstSeen:
    """Where each text was first met. Memory stays flat, whatever the number of texts.

    They are kept in a private SQLite file that the operating system removes (an empty name asks SQLite for one), by
    128-bit digests. Among 10^9 texts, two different ones have the same digest with a probability below 10^-20.
    """

    def __init__(self) -> None:
        # a generator that owns this object may be closed by another thread than the one that started it
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA cache_size=-16000")  # 16 MB
        self._db.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def __enter__(self) -> "FirstSeen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def before(self, text: str, place: str) -> str | None:
        """Where `text` was first met. None when it is new; then it is remembered as met at `place`."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, place)).rowcount:
            return None
        found = self._db.execute("SELECT place FROM seen WHERE digest = ?", (digest,)).fetchone()
        return str(found[0])
