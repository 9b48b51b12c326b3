"""Fetches published weights into the weights folder, from a hub or any other fsspec address.

A network's weights appear there complete or not at all. They are downloaded into a folder beside it, where a download
that broke off goes on. They move under the network's name only after they have been checked against the network.
"""

import contextlib
import json
import os
import re
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from data_manifests.storage import locate
from tasks.weights.catalogue import Published
from tasks.weights.missing import MissingBackend
from tasks.weights.store import WrongWeights, misfits, missing, published, sha256, weights_folder

PullProgress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes that have come, and the bytes in all (0 where the source does not say)."""

_BLOCK = 8 << 20  # bytes of one request; a broken connection loses no more
_TRIES = 5  # in a row in which not one byte came
_SILENCE_S = 60.0  # after so long without a byte, a connection is dead
_SPARE = 64 << 20  # bytes of the disk to leave free
# an address that ends in one of these is a file, any other is a folder
_FILES = (".safetensors", ".pth", ".pt", ".model", ".bin", ".ckpt", ".onnx", ".json", ".zip")
# subfolders of a network's folder of unfinished downloads: incomplete files and archives, and complete files
_PARTS, _WHOLE = "parts", "whole"
_PLAIN = re.compile(r"[\w][\w .+=@-]*", re.ASCII)
# the fields of a file's listing that change when its bytes do
_MARKS = ("size", "ETag", "etag", "blob_id", "sha256", "Content-MD5", "Last-Modified", "LastModified", "mtime")


class PullError(RuntimeError):
    """Weights could not be fetched. What has come is kept, and the next pull goes on from there."""


@dataclass(frozen=True)
class _Remote:
    """A file at a source."""

    name: str
    """Its path below the network's folder."""
    folder: str
    """The subfolder of the network's folder that an archive's files go to."""
    fs: Any
    path: str
    size: int
    """Bytes; 0 where the source does not say."""
    sha256: str
    """"" where the source does not say."""
    marks: str
    """A text that changes when the file's bytes do."""

    @property
    def is_archive(self) -> bool:
        return self.name.endswith(".zip")


def pull(name: str, source: str | None = None, progress: PullProgress = lambda file, done, total: None) -> Path:
    """Fetch a network's weights. Weights that are on this machine and fit are not fetched again.

    source: the address of a file, a zip of files, or a folder laid out like the network's own; the catalogue's when
        None.

    Returns the folder with the weights.

    Raises PullError; MissingBackend when the source lacks files; WrongWeights when the files do not fit the network. Of
    files that do not fit nothing is kept.
    """
    entry, folder = published(name), weights_folder() / name
    if folder.is_dir() and any(folder.iterdir()):
        if faults := _faults(name, folder):
            raise WrongWeights(
                f"{folder} is not empty, does not hold {name}, and is left as it is: {'; '.join(faults)}. "
                "Move it away and pull again"
            )
        return folder
    with _workplace(name) as place:
        remotes = [remote for sub, address in _sources(entry, source) for remote in _listed(entry, sub, address)]
        _check_complete(entry, remotes, source)
        _remove_outdated(place, remotes)
        _check_room(place, sum(remote.size for remote in remotes) - _size(place))
        for remote in remotes:
            _fetch(remote, place, progress)
        try:
            for remote in remotes:
                if remote.is_archive:
                    _unpack(entry, place / _PARTS / remote.name, remote.folder, place / _WHOLE)
            faults = _faults(name, place / _WHOLE)
        except WrongWeights as error:
            faults = [str(error)]
        if faults:
            shutil.rmtree(place)
            where = " and ".join(remote.path for remote in remotes[:3])
            raise WrongWeights(f"{where} is not {name}, and nothing of it is kept: {'; '.join(faults)}")
        (place / _WHOLE).replace(folder)
        shutil.rmtree(place)
    return folder


@contextlib.contextmanager
def _workplace(name: str) -> Iterator[Path]:
    """A network's folder for unfinished downloads, locked for this process. Raises PullError."""
    from filelock import FileLock, Timeout

    place = weights_folder() / ".pulling" / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_name(f"{name}.lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise PullError(f"another process is fetching {name} into {weights_folder()}; wait until it is done") from None
    except OSError as error:
        raise PullError(f"{place} cannot be written to: {error}; set UNDERSTUDY_WEIGHTS to another folder") from None
    try:
        yield place
    except OSError as error:
        raise PullError(f"{name}: {error}") from None
    finally:
        lock.release()


def _sources(entry: Published, source: str | None) -> list[tuple[str, str]]:
    """Subfolder and address of each source."""
    if source is None:
        return list(entry.sources.items())
    # a single file's address does not show which subfolder it belongs to
    only = list(entry.sources) if _is_file(source) and len(entry.sources) == 1 else [""]
    return [(only[0], source)]


def _is_file(address: str) -> bool:
    return _basename(address).endswith(_FILES)


def _basename(address: str) -> str:
    """The name of the file at an address: what follows "#" in a web address, else the end of the path."""
    if "://" in address:
        address, _, name = address.partition("#")
        address = name or address.partition("?")[0]
    return PurePosixPath(address).name


def _listed(entry: Published, sub: str, address: str) -> list[_Remote]:
    """The files at an address that match a network's `files` and `also`. sub: the subfolder that they go to.

    Raises PullError.
    """
    fs, path = _locate(address)
    with _readable(address):
        there = fs.info(path)
        if _is_file(address):
            found = {_basename(address): there}
        else:
            depth = max(pattern.count("/") for wanted in (*entry.files, *entry.also) for pattern in wanted.split("|"))
            base = there["name"].rstrip("/") + "/"
            listed = fs.find(path, maxdepth=depth + 1, detail=True)
            found = {str(key).removeprefix(base): info for key, info in listed.items() if str(key).startswith(base)}
    names = {f"{sub}/{name}" if sub else name: name for name in found if _is_plain(name)}
    chosen = [name for name in names if name.endswith(".zip") and _is_file(address)]
    for wanted in entry.files:
        chosen += next((some for some in (_fitting(names, p) for p in wanted.split("|")) if some), [])
    chosen += [name for wanted in entry.also for name in _fitting(names, wanted)]
    remotes = []
    for name in dict.fromkeys(chosen):
        info = dict(found[names[name]])
        with _readable(address):
            if info.get("size") is None:  # a web server lists only the names of files
                info = dict(fs.info(info["name"]))
        lfs = info.get("lfs") or {}
        info["sha256"] = lfs.get("sha256", "") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", "")
        marks = json.dumps({key: str(info[key]) for key in _MARKS if info.get(key)} | {"from": str(info["name"])})
        remotes.append(_Remote(name, sub, fs, info["name"], int(info.get("size") or 0), info["sha256"] or "", marks))
    return remotes


def _locate(address: str) -> tuple[Any, str]:
    with _readable(address):
        if address.startswith(("http://", "https://")):
            import aiohttp
            import fsspec

            # the default is five minutes for each file, however large
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
            return fsspec.filesystem(
                "http", client_kwargs={"timeout": timeout}, skip_instance_cache=True
            ), address.partition("#")[0]
        return locate(address)


@contextlib.contextmanager
def _readable(address: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise PullError(f"{address}: nothing is there; give another address with --from") from None
    except Exception as error:  # each library behind fsspec has its own kinds of errors
        raise PullError(f"{address} does not answer: {_said(error)}") from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_plain(name: str) -> bool:
    """Whether a relative name stays inside its folder. The names that a source gives are not trusted."""
    return all(_PLAIN.fullmatch(part) for part in name.split("/"))


def _fitting(names: Mapping[str, str], pattern: str) -> list[str]:
    depth = pattern.count("/")
    return sorted(name for name in names if name.count("/") == depth and PurePosixPath(name).match(pattern))


def _check_complete(entry: Published, remotes: list[_Remote], source: str | None) -> None:
    """Raises MissingBackend when a source lacks files that a network needs. Archives are checked after unpacking."""
    if any(remote.is_archive for remote in remotes):
        return
    names = {remote.name: "" for remote in remotes}
    lacking = [w.replace("|", " or ") for w in entry.files if not any(_fitting(names, p) for p in w.split("|"))]
    if lacking:
        where = source or " and ".join(entry.sources.values())
        raise MissingBackend(f"{where} does not have {', '.join(lacking)}, which {entry.name} needs")


def _check_room(place: Path, needed: int) -> None:
    """Raises PullError when `needed` bytes do not fit on the disk."""
    free = shutil.disk_usage(place).free
    if needed > free - _SPARE:
        raise PullError(
            f"{needed / 1e9:.1f} GB do not fit on the disk of {weights_folder()}, of which {free / 1e9:.1f} GB are "
            "free; set UNDERSTUDY_WEIGHTS to another folder"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove_outdated(place: Path, remotes: list[_Remote]) -> None:
    """Remove downloaded files that came from another source or have changed at their source since."""
    kept = place / "marks.json"
    try:
        before = json.loads(kept.read_text())
    except (OSError, ValueError):
        before = {}
    now = {remote.name: remote.marks for remote in remotes}
    for folder in (place / _PARTS, place / _WHOLE):
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            name = path.relative_to(folder).as_posix().removesuffix(".part")
            if name not in now or before.get(name) != now[name]:
                path.unlink()
    kept.write_text(json.dumps(now))


def _fetch(remote: _Remote, place: Path, progress: PullProgress) -> None:
    """Fetch a file, from where an earlier download broke off.

    Raises PullError after several tries in a row without a byte.
    """
    target = place / (_PARTS if remote.is_archive else _WHOLE) / remote.name
    if target.exists():
        progress(remote.name, remote.size, remote.size)
        return
    part = place / _PARTS / f"{remote.name}.part"
    for folder in (part.parent, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    failed, in_blocks = 0, remote.size > 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            with part.open("ab") as file:
                _append(remote, file, in_blocks, progress)
            break
        except _DiskError as error:
            raise PullError(f"{part} cannot be written: {error}") from None
        except Exception as error:  # each library behind fsspec has its own kinds of errors
            if in_blocks and isinstance(error, ValueError):  # a server without ranges, which sends whole files only
                in_blocks = False
                continue
            came = part.stat().st_size
            failed = 1 if in_blocks and came > before else failed + 1
            if failed == _TRIES or isinstance(error, FileNotFoundError | PermissionError):
                raise PullError(f"{remote.path} broke off at {came:,} bytes: {_said(error)}") from None
            time.sleep(2.0 ** (failed - 1) / 2)
    if remote.sha256 and sha256(part) != remote.sha256:
        part.unlink()
        raise PullError(f"{remote.path}: its sha256 is not the one that its source gives; pull again")
    part.replace(target)


class _DiskError(Exception):
    """The local disk failed, not the source."""


def _append(remote: _Remote, file: IO[bytes], in_blocks: bool, progress: PullProgress) -> None:
    """Fetch the rest of a partly fetched file. A source that is not read in blocks is read from its beginning."""
    if not in_blocks:
        file.truncate(0)
    done = file.seek(0, os.SEEK_END)
    options = {"block_size": _BLOCK, "cache_type": "none"} if in_blocks else {"block_size": 0}
    with remote.fs.open(remote.path, "rb", **options) as source:
        if done:
            source.seek(done)
        while (not remote.size or done < remote.size) and (block := source.read(_BLOCK)):
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                raise _DiskError(str(error)) from None
            done += len(block)
            progress(remote.name, done, remote.size)
    if remote.size and done != remote.size:
        raise EOFError(f"it ended at {done:,} of {remote.size:,} bytes")


def _unpack(entry: Published, archive: Path, sub: str, whole: Path) -> None:
    """Unpack the files of a zip that match a network's `files` and `also`, by the last part of their names.

    Raises WrongWeights.
    """
    folder = whole / sub
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            wanted = [
                (member, name)
                for member in packed.infolist()
                if _is_plain(name := member.filename.rpartition("/")[2])
                and not stat.S_ISLNK(member.external_attr >> 16)
                and any(
                    _fitting({f"{sub}/{name}" if sub else name: ""}, pattern)
                    for files in (*entry.files, *entry.also)
                    for pattern in files.split("|")
                )
            ]
            _check_room(whole, sum(member.file_size for member, _ in wanted))
            for member, name in wanted:
                with packed.open(member) as source, (folder / name).open("xb") as target:
                    shutil.copyfileobj(source, target, _BLOCK)
    except FileExistsError as error:
        raise WrongWeights(f"{archive.name} holds {Path(error.filename).name} twice") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise WrongWeights(f"{archive.name} cannot be unpacked: {error}") from None


def _faults(name: str, folder: Path) -> list[str]:
    """What is wrong with a folder of a network's weights, one sentence each; empty when they are complete and fit."""
    lacking = missing(published(name), folder)
    if lacking:
        return [f"{', '.join(lacking)} is not in it"]
    try:
        return misfits(name, folder)
    except MissingBackend as error:
        return [str(error)]
