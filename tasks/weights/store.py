"""The local store of published weights: finds a network's files, checks that they fit, and reads them safely.

Reading a checkpoint never runs code from it.

Every network has its own folder in the weights folder, `$UNDERSTUDY_WEIGHTS` or `~/.cache/understudy/weights`.
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
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.weights.catalogue import CATALOGUE, Published
from tasks.weights.missing import MissingBackend

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]
"""The shape of each tensor of a checkpoint, by key."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".model", ".bin", ".ckpt")
_MAX_SHOWN = 5  # keys of each kind in a message
_BLOCK = 1 << 22  # bytes
_DIGESTS = ".digests.json"
_HASH_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})\.\w+$")  # it has a letter; eight digits may be a date

log = logging.getLogger(__name__)


class WrongWeights(MissingBackend):
    """The weights on this machine do not fit their network, or cannot be read safely."""


def weights_folder() -> Path:
    """The weights folder."""
    chosen = os.environ.get("UNDERSTUDY_WEIGHTS")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "understudy" / "weights"


def published(name: str) -> Published:
    """The catalogue's entry of a network."""
    return CATALOGUE[name]


def find(name: str) -> Path:
    """The folder of a network. Raises MissingBackend when one of its files is missing."""
    require([name])
    return weights_folder() / name


def require(names: Iterable[str]) -> None:
    """Check that these networks have all their files. Raises MissingBackend, with a line for each that lacks some."""
    lines = []
    for name in dict.fromkeys(names):
        entry, folder = published(name), weights_folder() / name
        lacking = missing(entry, folder)
        if lacking:
            lines.append(
                f"weights of {name} are missing: {', '.join(lacking)}; looked in {folder} (UNDERSTUDY_WEIGHTS sets "
                f"another weights folder). `understudy weights pull {name}` gets them from "
                f"{' and '.join(entry.sources.values())}, or put them there yourself. {entry.instead} serves without "
                "weights"
            )
    if lines:
        raise MissingBackend("\n".join(lines))


def missing(entry: Published, folder: Path) -> list[str]:
    """The files of a network that are not in a folder, each described for a message."""
    return [wanted.replace("|", " or ") for wanted in entry.files if not _matches(folder, wanted)]


def files(name: str, folder: Path | None = None) -> list[Path]:
    """All files of a network, in the catalogue's order.

    folder: where to look; the network's own folder when None.

    Raises MissingBackend when a file is missing, WrongWeights when several files may be the checkpoint.
    """
    folder, entry = folder or find(name), published(name)
    found = list(dict.fromkeys(path for wanted in entry.files for path in _matches(folder, wanted)))
    if entry.single and len(found) > 1:
        raise WrongWeights(
            f"{folder} holds {len(found)} files of which each may be the checkpoint of {name}: "
            f"{', '.join(path.name for path in found)}; keep the right one there, and move the others away"
        )
    return found


def _matches(folder: Path, wanted: str) -> list[Path]:
    for pattern in wanted.split("|"):
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    return []


def check(name: str) -> None:
    """Check that a network's weights are there and fit it, and log its notice. Raises MissingBackend, WrongWeights."""
    entry, folder = published(name), find(name)
    differences = misfits(name, folder)
    if differences:
        raise WrongWeights(
            f"the weights in {folder} are not those of {name}: {'; '.join(differences)}. Move that folder away, and "
            f"`understudy weights pull {name}` gets the published ones; {entry.instead} serves without weights"
        )
    if entry.notice:
        log.warning("%s: %s", name, entry.notice)


def misfits(name: str, folder: Path) -> list[str]:
    """How the weights in a folder differ from those that a network takes, one sentence each; empty when they fit.

    The folder must have all files of the network. Only the headers of safetensors files are read.

    Raises WrongWeights when a file cannot be read safely.
    """
    entry, paths = published(name), files(name, folder)
    if not entry.expected_shapes:
        shapes(*(path for path in paths if path.suffix == ".safetensors"))
        return []
    module, function = entry.expected_shapes.split(":")
    try:
        takes: Shapes = getattr(importlib.import_module(module), function)(folder)
    except MissingBackend:
        raise
    except Exception as error:  # the config.json is broken or of another network; libraries raise many kinds of errors
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise WrongWeights(f"the config in {folder} is broken, or of another network than {name}: {said}") from None
    return compare(takes, shapes(*(path for path in paths if path.suffix in _SUFFIXES)))


def compare(takes: Mapping[str, tuple[int, ...]], has: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How a checkpoint's keys and shapes differ from those that a network takes, one sentence each; empty if they fit.

    takes: the network's keys and shapes. has: the checkpoint's.
    """
    missing = [key for key in takes if key not in has]
    extra = [key for key in has if key not in takes]
    other = [f"{key} {[*has[key]]} for {[*takes[key]]}" for key in takes if key in has and has[key] != takes[key]]
    kinds = (("missing", missing), ("left over", extra), ("of another shape", other))
    return [
        f"{len(keys)} {kind} ({', '.join(keys[:_MAX_SHOWN])}{', ...' if len(keys) > _MAX_SHOWN else ''})"
        for kind, keys in kinds
        if keys
    ]


def shapes(*paths: Path) -> Shapes:
    """The keys and shapes of a checkpoint that consists of these files. Only the headers of safetensors are read.

    Raises WrongWeights when a file cannot be read, and when two files have the same key and so are not parts of one
    checkpoint.
    """
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
                    "checkpoint; keep the right files there, and move the others away"
                )
            holder[key] = path
        found |= here
    return found


def read(path: Path) -> dict[str, "torch.Tensor"]:
    """A checkpoint's tensors by key, on the CPU.

    The prefix "module." that a parallel wrapper leaves is removed. Tensors that a training script has put into a
    "state_dict" or "model" are taken out of it.

    A pickle may hold tensors and plain containers and nothing else. Raises WrongWeights.
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
        # training scripts store their arguments beside the weights; they, too, are a plain container
        with torch.serialization.safe_globals([argparse.Namespace]):
            # memory-mapped: reading keys and shapes reads no numbers. Pickles of the old format cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen kinds of errors
        raise WrongWeights(
            f"{path} cannot be read as weights alone, and no code from it is run: {_reason(error)}. "
            "Get the published file again, or convert it to safetensors if you trust it"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WrongWeights(f"{path} holds no table of tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _reason(error: Exception) -> str:
    """The one line of torch's error that says what is wrong with a pickle. Its other lines say how to run it anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [
        line for line in lines if line.startswith(("Trying to", "Unsupported", "Invalid", "WeightsUnpickler error: "))
    ]
    return (reasons or lines or [type(error).__name__])[0]


def load_into(network: "torch.nn.Module", state: Mapping[str, "torch.Tensor"], where: Path) -> None:
    """Load a checkpoint into a network.

    where: the checkpoint's place, for the message. Raises WrongWeights unless keys and shapes are the same in both.
    """
    takes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    differences = compare(takes, {key: tuple(value.shape) for key, value in state.items()})
    if differences:
        raise WrongWeights(f"{where} does not fit {type(network).__name__}: {'; '.join(differences)}")
    network.load_state_dict(dict(state), strict=True)


def digest(name: str) -> str:
    """12 hex digits over the bytes of a network's files: the part that its weights have in a fingerprint.

    The files' names do not count. Hashing 15 GB takes half a minute. The hashes are therefore kept in the weights
    folder, by name, size and time of change, if that folder can be written. Raises MissingBackend.
    """
    known, changed, sums = _known_hashes(), False, []
    for path in files(name):
        key = _key(path)
        if key not in known:
            known[key], changed = sha256(path), True
        sums.append(known[key])
    if changed:
        _keep_hashes(known)
    return hashlib.sha256(" ".join(sorted(sums)).encode()).hexdigest()[:12]


def verify(name: str) -> list[str]:
    """Hash a network's files anew. Returns a sentence for each file that has changed or does not fit its name.

    By torch's custom a published name ends in the hash's first digits: `raft_large_C_T_SKHT_V2-ff5fadd5.pth`.
    Raises MissingBackend.
    """
    known, faults = _known_hashes(), []
    for path in files(name):
        sum_, promised = sha256(path), _HASH_IN_NAME.search(path.name)
        if promised and not sum_.startswith(promised[1]):
            faults.append(f"{path} has the hash {sum_[:8]}..., its name promises {promised[1]}")
        elif known.setdefault(_key(path), sum_) != sum_:
            faults.append(f"{path} has other bytes than before under the same size and time of change")
    if not faults:
        _keep_hashes(known)
    return faults


def _key(path: Path) -> str:
    status = path.stat()
    return f"{path.relative_to(weights_folder())} {status.st_size} {status.st_mtime_ns}"


def _known_hashes() -> dict[str, str]:
    try:
        known = json.loads((weights_folder() / _DIGESTS).read_text())
    except (OSError, ValueError):
        return {}
    return {key: sum_ for key, sum_ in known.items() if isinstance(sum_, str)} if isinstance(known, dict) else {}


def sha256(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    sum_ = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sum_.update(block)
    return sum_.hexdigest()


def _keep_hashes(known: dict[str, str]) -> None:
    path = weights_folder() / _DIGESTS
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(known, indent=1, sort_keys=True))
        aside.replace(path)
    except OSError:  # a weights folder that cannot be written is hashed again the next time
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
