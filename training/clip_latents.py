"""Latents and text embeddings that shards lack, made from the clips by the curation's own stage, and kept."""

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from data_manifests.lineage import Lineage
from data_manifests.storage import Storage
from tasks.clip import Clip, ClipRecord
from tasks.latent_codec import CODECS, STRIDE_S, STRIDE_T, usable_frames
from tasks.latents import Latents, LatentsSettings, picture_size
from tasks.stage import Measurement

Files = Callable[[], dict[str, bytes]]  # a sample's, by extension; called only when something is to be made

VERSION = 1  # raised whenever the same clip and settings would give other arrays


class ClipLatents:
    """The stage `latents` of given settings, on samples of shards.

    cache: where results are kept, by the shard's checksum, the sample's number and all that changes a number; made
    anew each time when None.
    """

    def __init__(self, settings: LatentsSettings, cache: Storage | None) -> None:
        """Raises tasks.stage.MissingBackend when the codec or the text encoder cannot run."""
        self._stage, self._cache = Latents(settings), cache
        self._stage.check()
        self._codec = CODECS[settings.backend](settings.channels)
        self.made_by = f"{settings.backend} {self._stage.version}, {self._stage.backend_version()}"
        self.text_dim = settings.dim
        about = {"version": VERSION, "made_by": self.made_by, "settings": settings.model_dump(mode="json")}
        self._made_with = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]

    def shape(self, frames: int, width: int, height: int) -> tuple[int, int, int, int]:
        """Of the latents of a clip: [latent frames, channels, height / 8, width / 8].

        Raises tasks.stage.Unmeasurable (a ValueError) for a picture that is too small.
        """
        _, (_, _, high, wide) = picture_size(width, height, self._stage.settings)
        return -(-usable_frames(frames) // STRIDE_T), self._codec.channels, high // STRIDE_S, wide // STRIDE_S

    def encode(self, shard: str, number: int, files: Files) -> tuple[np.ndarray, np.ndarray]:
        """A clip's latents and text embedding, as the stage gives them.

        shard: its sha256. number: the sample's in the shard. files: mp4, json, and guidance.json where it has one.
        Returns: [latent frames, channels, height, width] and [tokens, dim], float16.
        """
        latent, text = self._kept(shard, number, "latent"), self._kept(shard, number, "text_embedding")
        if latent is None or text is None:
            with _clip(files()) as clip:
                arrays = self._stage.measure(clip).arrays
            latent, text = arrays["latent"], arrays["text_embedding"]
            self._keep(shard, number, "latent", latent)
            self._keep(shard, number, "text_embedding", text)
        return latent, text

    def alone(self, shard: str, number: int, files: Files) -> np.ndarray:
        """Latents of every fourth frame, each encoded as a video of one frame; arguments as for `encode`.

        A window that begins at latent frame i begins with the picture of frame 4i alone, as every video does, and
        not with the latent of the four frames up to it. Returns: [latent frames, channels, height, width] float16.
        """
        kept = self._kept(shard, number, "alone")
        if kept is None:
            with _clip(files()) as clip:
                record = clip.record
                size, (top, left, high, wide) = picture_size(record.width, record.height, self._stage.settings)
                part = slice(top, top + high), slice(left, left + wide)
                frames = islice(clip.frames(None, size), 0, usable_frames(record.frames), STRIDE_T)
                latents = [next(iter(self._codec.encode([frame[part]]))).latent for frame in frames]
            limit = float(np.finfo(np.float16).max)
            kept = np.clip(np.stack(latents), -limit, limit).astype(np.float16)
            self._keep(shard, number, "alone", kept)
        return kept

    def _name(self, shard: str, number: int, name: str) -> str:
        return f"latents/{shard}-{self._made_with}/{number:06d}.{name}.npy"

    def _kept(self, shard: str, number: int, name: str) -> np.ndarray | None:
        if self._cache is None:
            return None
        try:
            data = self._cache.read_bytes(self._name(shard, number, name))
            array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
            return array if array.dtype == np.float16 else None
        except (FileNotFoundError, ValueError, EOFError):
            return None  # a broken one is made again

    def _keep(self, shard: str, number: int, name: str, array: np.ndarray) -> None:
        if self._cache is not None:
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            self._cache.write_bytes(self._name(shard, number, name), buffer.getvalue())


@contextlib.contextmanager
def _clip(files: dict[str, bytes]) -> Iterator[Clip]:
    """A sample of a shard as the stages see clips."""
    lineage = Lineage.model_validate_json(files["json"])
    about, source = lineage.clip, lineage.source
    record = ClipRecord(
        clip_id=lineage.clip_id,
        source_id=source.source_id,
        start_s=source.start_s,
        end_s=source.end_s,
        fps=about.fps,
        frames=about.frames,
        width=about.width,
        height=about.height,
        video="",
        audio="",
        metadata=lineage.metadata,
    )
    found = {}
    if "guidance.json" in files:
        found["guidance"] = Measurement({}, files={"guidance.json": files["guidance.json"]})
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        path = Path(folder) / "clip.mp4"
        path.write_bytes(files["mp4"])
        yield Clip(record, path, None, found)
