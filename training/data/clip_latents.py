"""Latents and text embeddings that shards lack: made from the clips by the curation's stage `latents`, and cached."""

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
from tasks.media.clip import Clip, ClipRecord, Measurement
from tasks.networks.latent_geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, usable_frames
from tasks.stages.latents.codec import CODECS
from tasks.stages.latents.stage import Latents, LatentsSettings, picture_size
from training.data.shard_index import HEADER_LOCK

ReadFiles = Callable[[], dict[str, bytes]]  # reads a sample's files, by extension; called only on a cache miss

VERSION = 1  # raised whenever the same clip and settings would give other arrays


class ClipLatents:
    """The stage `latents` with given settings, run on samples of shards.

    cache: where results are kept, by the shard's checksum, the sample's number and all that changes a number. None:
        results are made again each time.

    Raises tasks.weights.missing.MissingBackend when the codec or the text encoder cannot run.
    """

    def __init__(self, settings: LatentsSettings, cache: Storage | None) -> None:
        self._stage, self._cache = Latents(settings), cache
        self._stage.check()
        self._codec = CODECS[settings.backend](settings.channels)
        self.made_by = f"{settings.backend} {self._stage.version}, {self._stage.backend_version()}"
        self.text_dim = settings.dim
        about = {"version": VERSION, "made_by": self.made_by, "settings": settings.model_dump(mode="json")}
        self._made_with = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]

    def shape(self, frames: int, width: int, height: int) -> tuple[int, int, int, int]:
        """The shape of a clip's latents: [latent frames, channels, height / 8, width / 8].

        Raises tasks.media.clip.Unmeasurable (a ValueError) for frames that are too small.
        """
        _, (_, _, high, wide) = picture_size(width, height, self._stage.settings)
        return (
            -(-usable_frames(frames) // TEMPORAL_STRIDE),
            self._codec.channels,
            high // SPATIAL_STRIDE,
            wide // SPATIAL_STRIDE,
        )

    def encode(self, shard: str, number: int, files: ReadFiles) -> tuple[np.ndarray, np.ndarray]:
        """A clip's latents and text embedding, as the stage gives them.

        shard: its sha256. number: the sample's number in the shard. files: reads mp4, json, and guidance.json if any.
        Returns: [latent frames, channels, height, width] and [tokens, dim], float16.
        """
        latent, text = self._cached(shard, number, "latent"), self._cached(shard, number, "text_embedding")
        if latent is None or text is None:
            with _clip(files()) as clip:
                arrays = self._stage.measure(clip).arrays
            latent, text = arrays["latent"], arrays["text_embedding"]
            self._write_to_cache(shard, number, "latent", latent)
            self._write_to_cache(shard, number, "text_embedding", text)
        return latent, text

    def alone(self, shard: str, number: int, files: ReadFiles) -> np.ndarray:
        """Latents of every fourth frame, each frame encoded as a video of one frame. Arguments as for `encode`.

        Latent frame 0 of every video covers one frame alone. So a window that begins at latent frame i must begin with
        the latent of frame 4i alone, not with the clip's latent i, which covers the four frames up to 4i.

        Returns: [latent frames, channels, height, width] float16.
        """
        latents = self._cached(shard, number, "alone")
        if latents is None:
            with _clip(files()) as clip:
                record = clip.record
                size, (top, left, high, wide) = picture_size(record.width, record.height, self._stage.settings)
                crop = slice(top, top + high), slice(left, left + wide)
                frames = islice(clip.frames(None, size), 0, usable_frames(record.frames), TEMPORAL_STRIDE)
                encoded = [next(iter(self._codec.encode([frame[crop]]))).latent for frame in frames]
            limit = float(np.finfo(np.float16).max)
            latents = np.clip(np.stack(encoded), -limit, limit).astype(np.float16)
            self._write_to_cache(shard, number, "alone", latents)
        return latents

    def _name(self, shard: str, number: int, name: str) -> str:
        return f"latents/{shard}-{self._made_with}/{number:06d}.{name}.npy"

    def _cached(self, shard: str, number: int, name: str) -> np.ndarray | None:
        if self._cache is None:
            return None
        try:
            data = self._cache.read_bytes(self._name(shard, number, name))
            with HEADER_LOCK:
                array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
            return array if array.dtype == np.float16 else None
        except (FileNotFoundError, ValueError, EOFError):
            return None  # a damaged file is made again

    def _write_to_cache(self, shard: str, number: int, name: str, array: np.ndarray) -> None:
        if self._cache is not None:
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            self._cache.write_bytes(self._name(shard, number, name), buffer.getvalue())


@contextlib.contextmanager
def _clip(files: dict[str, bytes]) -> Iterator[Clip]:
    """A sample's files as the Clip that stages take."""
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
    upstream = {}
    if "guidance.json" in files:
        upstream["guidance"] = Measurement({}, files={"guidance.json": files["guidance.json"]})
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        path = Path(folder) / "clip.mp4"
        path.write_bytes(files["mp4"])
        yield Clip(record, path, None, upstream)
