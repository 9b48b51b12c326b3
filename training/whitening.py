"""How large the network sees each channel of a dataset's latents.

A codec promises channels of about unit variance, which holds for what it was made for; other footage may have ten times
as much of one channel as of another. The loss then is about the one, and noise hides the other long before it.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from data_manifests.dataset import load
from data_manifests.samples import brief
from data_manifests.storage import Storage
from tasks.latent_codec import CODECS, latent_frames
from training.buckets import LoaderError
from training.clip_latents import ClipLatents
from training.config import TrainingRecipe
from training.sample_reader import SampleReader
from training.shard_index import read_index

_LEAST_STD = 1e-3  # of a channel in which there is nothing
_SAMPLES = 256  # of which a deviation is told to 1 % where channels are near normal


def latent_scale(address: str, recipe: TrainingRecipe, cache: str) -> tuple[float, ...]:
    """What each channel is to be divided by, so that of its deviation in the picture the power 1 - `recipe.data.whiten`
    is left, and over all channels the mean square is 1: [channels].

    cache: a folder, as the loader's. Raises LoaderError when no sample can be read, or the store does not answer.
    """
    assert recipe.data.whiten is not None
    latents = recipe.data.latents
    gains = CODECS[latents.backend](latents.channels).gains.astype(np.float64)
    std = np.maximum(channel_std(address, recipe, cache), _LEAST_STD)
    scale = (std * gains) ** recipe.data.whiten / gains
    scale *= np.sqrt(np.square(std / scale).mean())
    return tuple(scale.tolist())


def channel_std(address: str, recipe: TrainingRecipe, cache: str) -> np.ndarray:
    """The standard deviation of each channel about 0, over the first samples of a dataset: [channels] float64.

    About 0 and not the mean, since it is how far from 0 the noise has to reach. cache: a folder, as the loader's.

    Raises LoaderError when no sample can be read, or the store does not answer.
    """
    total, count = 0.0, 0
    faults: list[str] = []
    for latent in itertools.islice(_latents(address, recipe, cache, faults), _SAMPLES):
        squares = np.square(latent.astype(np.float64))
        total, count = total + squares.sum(axis=(0, 2, 3)), count + squares[:, 0].size
    if not count:
        first = f"; {len(faults)} cannot be read, the first of them {faults[0]}" if faults else ""
        raise LoaderError(
            f"{address} has no sample to measure latents by: none of {recipe.data.frames} frames at {recipe.data.fps} "
            f"frames a second, as the recipe's training.data asks for{first}"
        )
    std: np.ndarray = np.sqrt(total / count)
    return std


def _latents(address: str, recipe: TrainingRecipe, cache: str, faults: list[str]) -> Iterator[np.ndarray]:
    """[latent frames, channels, height, width] of one sample after another, of as many frames as the recipe's.

    Samples that cannot be read are passed by, as the loader does, and put into `faults`. A store that does not answer
    is no sample's fault: another time its samples would be there, and give another number.
    """
    import av

    data = recipe.data
    shards = sorted((s for s in load(address).shards if s.tier in data.tiers), key=lambda shard: shard.name)
    storage = Storage(address.rpartition("/")[0] or ("/" if address.startswith("/") else "."))
    kept = Storage(cache)
    reader = SampleReader(storage, shards, ClipLatents(data.latents, kept))
    frames = latent_frames(data.frames)
    for number, shard in enumerate(shards):
        try:
            entries = read_index(storage, shard, kept).entries
        except OSError as error:
            raise LoaderError(f"{address}: {shard.name} cannot be read: {error}") from error
        for place, entry in enumerate(entries):
            where = f"{shard.name}: {entry.key}"
            try:
                if entry.fault:
                    raise ValueError(entry.fault)
                if entry.fps != data.fps or reader.latent_shape(entry)[0][0] < frames:
                    continue
                latent = reader.latent(number, place, entry)[:frames]
                if len(latent) < frames or not np.isfinite(latent).all():
                    raise ValueError("its latents are fewer than its frames, or not finite")
            except (FileNotFoundError, av.FFmpegError) as error:  # some of FFmpeg's are OSErrors, all about the clip
                faults.append(f"{where}: {brief(error)}")
            except OSError as error:
                raise LoaderError(f"{address}: {where} cannot be read: {error}") from error
            except Exception as error:  # whatever else a broken sample makes its reader raise
                faults.append(f"{where}: {brief(error)}")
            else:
                yield latent
