"""Packs puppets as shards, with the encoder, stages, shard writer and schema of the curation."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_manifests.dataset import DatasetManifest
from data_manifests.lineage import RecipeName
from data_manifests.storage import Storage
from tasks.media.clip import SAMPLE_RATE, Clip, ClipRecord
from tasks.media.encode import ClipEncoder
from tasks.networks.log_mel import frame_windows
from tasks.shards import Sample, ShardSettings, lineage, plan_shards, write_shard
from tasks.stages.latents.stage import Latents, LatentsSettings
from tasks.synthetic.puppets import FPS, FRAMES, SIZE, Puppet

VERSION = 2
QP = 8  # of x264; with it, the readers get within a few hundredths of the truth from coded frames
# Small: the frames have a few colours and edges, unlike photographs.
LATENTS = LatentsSettings(channels=64, multiple=8, dim=64, max_tokens=16)


def make_puppets(
    folder: Path,
    count: int,
    seed: int = 0,
    *,
    size: int = SIZE,
    frames: int = FRAMES,
    two: bool = False,
    moving_camera: bool = False,
    latents: LatentsSettings | None = LATENTS,
    unusable: float = 0.0,
    hq: float = 0.0,
    silent: float = 0.1,
    samples_a_shard: int = 250,
    progress: Callable[[int, int], object] | None = None,
) -> DatasetManifest:
    """Write a dataset of the puppets 0 to count - 1 of a seed into `folder`: shards, and `dataset.json`.

    size: pixels of a side, a multiple of 8.
    frames: frames of each clip. two: with a partner. moving_camera: the camera turns in two of three clips.
    latents: settings of the stage `latents`; None for shards without latents and text embeddings.
    unusable: share of clips with the sound of another puppet, which is marked as not usable.
    hq: share of clips in the narrower tier "hq"; the others are in "main".
    silent: share of clips without speech, so that a model also learns silence. The spectrogram is clamped relative to
        its loudest moment, so a silent clip looks different from a pause.
    samples_a_shard: the most samples in one shard.
    progress: called after each clip with the number of clips made and the number of all.

    Returns: the content of `dataset.json`. The same arguments give the same bytes. `Puppet.of(seed, number, size=...,
    ...)` gives the puppet of a sample again, except whether it is silent. The puppet's number is in the metadata of
    the sample's lineage, its gesture and camera are in the scores of "puppet".
    """
    if size % 8:
        raise ValueError(f"size is {size}, but latents take multiples of 8 pixels; give a multiple of 8")
    storage = Storage(str(folder))
    stage = Latents(latents) if latents else None
    recipe = puppets_recipe(seed, size, frames, two, moving_camera, silent, latents)
    samples: dict[str, list[Sample]] = {"hq": [], "main": []}
    for number in range(count):
        puppet = Puppet.of(seed, number, size=size, frames=frames, two=two, moving_camera=moving_camera)
        puppet = replace(puppet, silent=_share(number, 11) >= 1 - silent)  # never number 0, which previews show
        tier = "hq" if _share(number, 7) < hq else "main"
        usable = _share(number, 3) >= unusable
        samples[tier].append(_sample(storage, puppet, number, stage, usable, tier, recipe))
        if progress:
            progress(number + 1, count)
    shards = [
        write_shard(plan, storage)
        for tier, some in samples.items()
        for plan in plan_shards(
            sorted(some, key=lambda sample: sample.key), ShardSettings(max_samples=samples_a_shard), 0, tier
        )
    ]
    for name in ("clips", "features"):
        shutil.rmtree(folder / name, ignore_errors=True)
    manifest = DatasetManifest.of(recipe, f"puppets of seed {seed}", shards)
    manifest.write(storage)
    return manifest


def puppets_recipe(
    seed: int = 0,
    size: int = SIZE,
    frames: int = FRAMES,
    two: bool = False,
    moving_camera: bool = False,
    silent: float = 0.1,
    latents: LatentsSettings | None = LATENTS,
) -> RecipeName:
    """The recipe that `make_puppets` names in its manifest. Its hash covers the arguments that change the puppets, but
    not their number.
    """
    settings = Latents(latents).settings.model_dump() if latents else None
    made_with = [VERSION, seed, size, frames, two, moving_camera, silent, settings]
    digest = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()
    return RecipeName(name="puppets", hash=digest[:12])


def _share(number: int, step: int) -> float:
    """A number in 0..1 for each puppet. The numbers are spread evenly, also over the puppets of one gesture."""
    return (number * step * 0.6180339887498949) % 1.0


def _sample(
    storage: Storage,
    puppet: Puppet,
    number: int,
    stage: Latents | None,
    usable: bool,
    tier: str,
    recipe: RecipeName,
) -> Sample:
    sha256 = hashlib.sha256(f"{recipe.hash} {number}".encode()).hexdigest()
    pictures = puppet.pictures
    record = ClipRecord(
        clip_id=f"{number:06d}-{sha256[:16]}",
        source_id=sha256[:16],
        start_s=0.0,
        end_s=puppet.frames / FPS,
        fps=FPS,
        frames=puppet.frames,
        width=pictures.shape[2],
        height=pictures.shape[1],
        video=f"clips/{sha256}.mp4",
        audio=f"clips/{sha256}.flac",
        metadata={"caption": puppet.caption, "number": str(number)},
    )
    storage.write(record.video, lambda path: encode_video(path, pictures))
    sound = puppet.sound if usable else replace(puppet, voice=puppet.voice + 1, partner=None).sound
    storage.write_bytes(record.audio, _flac(sound))
    size = storage.size(record.video) + storage.size(record.audio)
    arrays = {"log_mel": frame_windows(sound, puppet.frames, FPS)}
    if puppet.partner:
        own = [frame_windows(p.own_sound, puppet.frames, FPS) for p in puppet.people]
        arrays |= {"speaker_log_mel": np.stack(own, axis=1), "speaker_mask": puppet.masks}
    scores = {"puppet": _score("puppets", str(VERSION), {"gesture": puppet.gesture, "camera": puppet.camera})}
    if stage:
        found = stage.measure(Clip(record, Path(storage.path(record.video)), None))
        arrays |= found.arrays
        made_by = f"{stage.version}, {stage.backend_version()}"
        scores["latents"] = _score(stage.settings.backend, made_by, found.columns)
    files = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        files[f"{name}.npy"] = f"features/{sha256}.{name}.npy"
        storage.write_bytes(files[f"{name}.npy"], buffer.getvalue())
        size += buffer.getbuffer().nbytes
    about = lineage(
        record,
        uri=f"puppets/{number}",
        sha256=sha256,
        audio_usable=usable,
        audio_reason="" if usable else "the sound is another puppet's",
        scores=scores,
        rules={},
        tier=tier,
        recipe_name=recipe.name,
        recipe_hash=recipe.hash,
        unaligned=Latents.unaligned if stage else (),
    )
    return Sample.of(record, about, files, size)


def _score(backend: str, version: str, values: object) -> dict[str, object]:
    return {"backend": backend, "version": version, "fingerprint": "0" * 12, "values": values}


def encode_video(path: Path, pictures: np.ndarray) -> None:
    """Encode frames as clips are encoded, at a finer quality. pictures: [frames, height, width, 3] uint8 RGB."""
    import av
    import cv2

    height, width = pictures.shape[1:3]
    encoder = ClipEncoder(path, FPS, (width, height), QP, "veryfast", height)
    for picture in pictures:
        planes: Any = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2YUV_I420)
        encoder.add(av.VideoFrame.from_ndarray(planes, format="yuv420p"))
    encoder.close()


def _flac(samples: np.ndarray) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
