"""Writes the generated files and their table."""

import difflib
import os
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tasks.synthetic.catalogue import files
from tasks.synthetic.truth import Truth, read_table, write_table


def catalogue(groups: Collection[str] | None = None) -> list[str]:
    """The names of all files, or of the files in any of the groups, sorted. Nothing is written."""
    return sorted(f.name for f in files().values() if groups is None or set(groups) & set(f.groups))


def make(
    folder: Path,
    names: Collection[str] | None = None,
    groups: Collection[str] | None = None,
    progress: Callable[[str, int, int], object] | None = None,
    workers: int | None = None,
) -> list[Truth]:
    """Write files into `folder`, and `truth.csv` beside them. Files that exist already are not written again.

    names, groups: the files to write: those named and those in the groups. When both are None, all files except the
        group "faults_more", which has many further variants of faults.
    progress: called after each file with its name, the number of finished files and the number of all.
    workers: processes; one a core when None.

    Returns: the truth of the files asked for, sorted by name. The same bytes come out each time. Raises ValueError for
    a name or a group that does not exist.
    """
    from filelock import FileLock

    wanted = _wanted(names, groups)
    folder.mkdir(parents=True, exist_ok=True)
    if set(wanted) <= _known(folder).keys():
        return read_table(folder, wanted)
    # without the lock, another process could write the same file, or lose a row of the table
    with FileLock(folder / ".making.lock"):
        known = _known(folder)
        missing = [name for name in wanted if name not in known]
        workers = min(workers or os.cpu_count() or 1, len(missing))
        done = 0

        def finished(row: Truth) -> None:
            nonlocal done
            known[row.file] = row
            write_table(folder, known.values())
            done += 1
            if progress:
                progress(row.file, done, len(missing))

        if workers <= 1:
            for name in missing:
                finished(_make_one(folder, name))
        else:
            with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
                for row in pool.map(_make_one, [folder] * len(missing), missing):
                    finished(row)
        return read_table(folder, wanted)


def _known(folder: Path) -> dict[str, Truth]:
    """The rows of the table whose files exist, by name."""
    return {row.file: row for row in read_table(folder) if (folder / row.file).exists()}


def _one_thread() -> None:
    """One thread for each process: there is a process for each core."""
    import cv2

    cv2.setNumThreads(1)


def _wanted(names: Collection[str] | None, groups: Collection[str] | None) -> list[str]:
    """The names of the files asked for, sorted."""
    everything = catalogue()
    if names is None and groups is None:
        return sorted(set(everything) - set(catalogue(["faults_more"])))
    for name in sorted(set(names or ()) - set(everything)):
        near = difflib.get_close_matches(name, everything, 1)
        hint = f"did you mean {near[0]!r}?" if near else "tasks.synthetic.catalogue() lists all"
        raise ValueError(f"no generated file is called {name!r}; {hint}")
    known_groups = {group for file in files().values() for group in file.groups}
    if unknown := sorted(set(groups or ()) - known_groups):
        raise ValueError(f"no group is called {', '.join(unknown)}; there are {', '.join(sorted(known_groups))}")
    return sorted(set(names or ()) | set(catalogue(groups) if groups else ()))


def _make_one(folder: Path, name: str) -> Truth:
    """Write one file under a temporary name, then rename it."""
    beside = folder / f".making-{os.getpid()}.tmp"
    try:
        truth = files()[name].write(beside)
        beside.replace(folder / name)
    finally:
        beside.unlink(missing_ok=True)
    return truth
