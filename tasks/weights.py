"""Published weights: where a network's checkpoint lies, whether it fits, and reading it without running what is in it.

Every network has a folder of its own in one weights folder, `$UNDERSTUDY_WEIGHTS` or `~/.cache/understudy/weights`.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.stage import MissingBackend

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]

_SUFFIXES = (".safetensors", ".pth", ".pt", ".model", ".bin", ".ckpt")
_SHOWN = 5  # keys of each kind in a message
_BLOCK = 1 << 22  # bytes
_DIGESTS = ".digests.json"
_PROMISED = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})\.\w+$")  # with a letter in it, or it may be a date

log = logging.getLogger(__name__)


class WrongWeights(MissingBackend):
    """Weights that are there and do not fit, or cannot be read safely."""


@dataclass(frozen=True)
class Published:
    """A published set of weights.

    files: names under the network's folder, each a pattern; "a|b": either will do, the first that is there. All that
        can change a number: a tokenizer and a config.json too.
    source: for `understudy models pull`, the fsspec address of a folder, a file or a zip of files; or of several, by
        the subfolder that each goes to. `#name` at the end of a web address names the file where the address does not.
    gigabytes: of all files together. instead: the backend that serves without weights.
    takes: "module:function"; the function gives the keys and shapes that its network takes, from the network's folder.
        "" where a library reads a format of its own.
    notice: said when the backend is chosen.
    also: patterns of files that are pulled along where the source has them, such as the index of several files.
    single: whether its checkpoint is one file, so that of several in the folder none is chosen silently.
    serves: who uses it, where no stage's backend does.
    """

    name: str
    files: tuple[str, ...]
    source: str | Mapping[str, str]
    licence: str
    gigabytes: float
    instead: str
    takes: str = ""
    notice: str = ""
    also: tuple[str, ...] = ()
    single: bool = False
    serves: str = ""

    @property
    def sources(self) -> Mapping[str, str]:
        """Addresses by the subfolder that each goes to; "" for the network's folder itself."""
        return {"": self.source} if isinstance(self.source, str) else self.source


def weights_folder() -> Path:
    """Where weights are looked for."""
    chosen = os.environ.get("UNDERSTUDY_WEIGHTS")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "understudy" / "weights"


def published(name: str) -> Published:
    """The catalogue's entry of a network."""
    from tasks.networks.catalogue import CATALOGUE

    return CATALOGUE[name]


def find(name: str) -> Path:
    """The folder of a network whose files are all there. Raises MissingBackend."""
    require([name])
    return weights_folder() / name


def require(names: Iterable[str]) -> None:
    """See that the files of all these networks are there. Raises MissingBackend, a line for each that lacks some."""
    lines = []
    for name in dict.fromkeys(names):
        entry, folder = published(name), weights_folder() / name
        lacking = missing(entry, folder)
        if lacking:
            lines.append(
                f"weights of {name} are missing: {', '.join(lacking)}; looked in {folder} (UNDERSTUDY_WEIGHTS names "
                f"another weights folder). `understudy models pull {name}` gets them from "
                f"{' and '.join(entry.sources.values())}, or put them there yourself. {entry.instead} serves without "
                "weights"
            )
    if lines:
        raise MissingBackend("\n".join(lines))


def missing(entry: Published, folder: Path) -> list[str]:
    """Which of a network's files are not in a folder, in words."""
    return [wanted.replace("|", " or ") for wanted in entry.files if not _matches(folder, wanted)]


def files(name: str, folder: Path | None = None) -> list[Path]:
    """All files of a network, in the catalogue's order; in its own folder when None. Raises MissingBackend, and
    WrongWeights where nobody can tell which of several files is the checkpoint."""
    folder, entry = folder or find(name), published(name)
    found = list(dict.fromkeys(path for wanted in entry.files for path in _matches(folder, wanted)))
    if entry.single and len(found) > 1:
        raise WrongWeights(
            f"{folder} holds {len(found)} files of which each may be the checkpoint of {name}: "
            f"{', '.join(path.name for path in found)}; leave the one that is meant there, and move the others away"
        )
    return found


def _matches(folder: Path, wanted: str) -> list[Path]:
    for pattern in wanted.split("|"):
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    return []


def check(name: str) -> None:
    """See that a network's weights are there and fit it, and say its notice. Raises MissingBackend, WrongWeights."""
    entry, folder = published(name), find(name)
    differences = misfits(name, folder)
    if differences:
        raise WrongWeights(
            f"the weights in {folder} are not those of {name}: {'; '.join(differences)}. Move that folder away, and "
            f"`understudy models pull {name}` gets the published ones; {entry.instead} serves without weights"
        )
    if entry.notice:
        log.warning("%s: %s", name, entry.notice)


def misfits(name: str, folder: Path) -> list[str]:
    """How the weights in a folder, all of whose files are there, differ from those that a network takes, in words; of
    safetensors only the headers are read. Raises WrongWeights on what cannot be read safely."""
    entry, paths = published(name), files(name, folder)
    if not entry.takes:
        shapes(*(path for path in paths if path.suffix == ".safetensors"))
        return []
    module, function = entry.takes.split(":")
    try:
        takes: Shapes = getattr(importlib.import_module(module), function)(folder)
    except MissingBackend:
        raise
    except Exception as error:  # a config.json of another network, or a broken one: the libraries' errors are many
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise WrongWeights(f"what {folder} says of itself is not {name}: {said}") from None
    return compare(takes, shapes(*(path for path in paths if path.suffix in _SUFFIXES)))


def compare(takes: Mapping[str, tuple[int, ...]], has: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How a checkpoint's keys and shapes differ from those that a network takes, in words; empty where they do not."""
    missing = [key for key in takes if key not in has]
    extra = [key for key in has if key not in takes]
    other = [f"{key} {[*has[key]]} for {[*takes[key]]}" for key in takes if key in has and has[key] != takes[key]]
    kinds = (("missing", missing), ("left over", extra), ("of another shape", other))
    return [
        f"{len(keys)} {kind} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
        for kind, keys in kinds
        if keys
    ]


def shapes(*paths: Path) -> Shapes:
    """The keys and shapes of a checkpoint of one file or several, without reading the numbers of safetensors. Raises
    WrongWeights, also where two files have the same key: they are not parts of one checkpoint."""
    found: Shapes = {}
    holder: dict[str, Path] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="numpy") as tensors:
                    here = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise WrongWeights(f"{path} cannot be read as safetensors: {error}") from None
        else:
            here = {key: tuple(tensor.shape) for key, tensor in read(path).items()}
        for key in here:
            if key in holder:
                raise WrongWeights(
                    f"{key} is in {holder[key].name} and in {path.name} of {path.parent}, which are not parts of one "
                    "checkpoint; leave there those that are meant, and move the others away"
                )
            holder[key] = path
        found |= here
    return found


def read(path: Path) -> dict[str, "torch.Tensor"]:
    """A checkpoint's tensors by key, on the CPU; without the "module." that a parallel wrapper leaves, and out of the
    "state_dict" or "model" that a training script puts them in.

    A pickle is opened with nothing allowed in it but tensors and plain containers. Raises WrongWeights.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WrongWeights(f"{path} cannot be read as safetensors: {error}") from None
    try:
        # the arguments that a training script leaves beside the weights are a plain container as well
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped, so that a look at keys and shapes reads no numbers; pickles of the old format cannot be
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen kinds, by what is wrong with the file
        raise WrongWeights(
            f"{path} cannot be read as weights alone, and nothing else is run from it: {_reason(error)}. "
            "Get the published file again, or convert it to safetensors where you trust it"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WrongWeights(f"{path} holds no table of tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _reason(error: Exception) -> str:
    """What is wrong with a pickle, out of torch's page of advice, which includes how to run it nevertheless."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [
        line for line in lines if line.startswith(("Trying to", "Unsupported", "Invalid", "WeightsUnpickler error: "))
    ]
    return (said or lines or [type(error).__name__])[0]


def fill(network: "torch.nn.Module", state: Mapping[str, "torch.Tensor"], where: Path) -> None:
    """Put a checkpoint into a network, every key of one in the other. Raises WrongWeights with the difference."""
    takes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    differences = compare(takes, {key: tuple(value.shape) for key, value in state.items()})
    if differences:
        raise WrongWeights(f"{where} does not fit {type(network).__name__}: {'; '.join(differences)}")
    network.load_state_dict(dict(state), strict=True)


def digest(name: str) -> str:
    """12 hex digits over the bytes of a network's files: its weights' part of a fingerprint. Raises MissingBackend.

    What the files are called does not count. Their hashes are kept beside the weights by size and time of change, where
    that can be written: hashing 15 GB takes half a minute.
    """
    known, changed, sums = _known(), False, []
    for path in files(name):
        key = _key(path)
        if key not in known:
            known[key], changed = sha256(path), True
        sums.append(known[key])
    if changed:
        _keep(known)
    return hashlib.sha256(" ".join(sorted(sums)).encode()).hexdigest()[:12]


def verify(name: str) -> list[str]:
    """Hash a network's files anew, and tell which are not what they were or what their names promise, in words.

    `raft_large_C_T_SKHT_V2-ff5fadd5.pth`: by torch's custom a published name ends in the hash's first digits.
    Raises MissingBackend.
    """
    known, faults = _known(), []
    for path in files(name):
        sum_, promised = sha256(path), _PROMISED.search(path.name)
        if promised and not sum_.startswith(promised[1]):
            faults.append(f"{path} has the hash {sum_[:8]}..., its name promises {promised[1]}")
        elif known.setdefault(_key(path), sum_) != sum_:
            faults.append(f"{path} has other bytes than before under the same size and time of change")
    if not faults:
        _keep(known)
    return faults


def _key(path: Path) -> str:
    status = path.stat()
    return f"{path.relative_to(weights_folder())} {status.st_size} {status.st_mtime_ns}"


def _known() -> dict[str, str]:
    try:
        known = json.loads((weights_folder() / _DIGESTS).read_text())
    except (OSError, ValueError):
        return {}
    return {key: sum_ for key, sum_ in known.items() if isinstance(sum_, str)} if isinstance(known, dict) else {}


def sha256(path: Path) -> str:
    """A file's hash, 64 hex digits."""
    sum_ = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sum_.update(block)
    return sum_.hexdigest()


def _keep(known: dict[str, str]) -> None:
    path = weights_folder() / _DIGESTS
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(known, indent=1, sort_keys=True))
        aside.replace(path)
    except OSError:  # a weights folder that is only read is hashed again the next time
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
