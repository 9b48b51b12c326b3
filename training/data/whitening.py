"""The scale of each latent channel, measured on a dataset.

A codec promises channels of about unit variance. That holds for the footage that it was made for. In other footage one
channel may be ten times as large as another. The large channel then dominates the loss, and noise hides the small one
long before the large one.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from data_manifests.dataset import load
from data_manifests.samples import one_line
from data_manifests.storage import Storage
from tasks.networks.latent_geometry import latent_frames
from tasks.stages.latents.codec import CODECS
from training.config import TrainingRecipe
from training.data.buckets import LoaderError
from training.data.clip_latents import ClipLatents
from training.data.sample_reader import SampleReader
from training.data.shard_index import read_index, shards_by_name, shards_storage

_MIN_STD = 1e-3  # of an empty channel
_SAMPLES = 256  # clips that are measured; their deviation is exact to 1 % where channels are near normal


def latent_scale(address: str, recipe: TrainingRecipe, cache: str) -> tuple[float, ...]:
    """The divisor of each channel: [channels].

    A channel's size is its standard deviation in units of the decoded frames. After division it is that size to the
    power 1 - `recipe.data.whiten`, times a factor that all channels share. The factor makes the mean square over all
    divided channels 1.

    cache: the loader's cache folder. Raises LoaderError when no sample can be read, or the store does not answer.
    """
    assert recipe.data.whiten is not None
    latents = recipe.data.latents
    gains = CODECS[latents.backend](latents.channels).gains.astype(np.float64)
    std = np.maximum(channel_rms(address, recipe, cache), _MIN_STD)
    scale = (std * gains) ** recipe.data.whiten / gains
    scale *= np.sqrt(np.square(std / scale).mean())
    return tuple(scale.tolist())


def channel_rms(address: str, recipe: TrainingRecipe, cache: str) -> np.ndarray:
    """The root mean square of each channel over the first samples of a dataset: [channels] float64.

    It is the deviation about 0, not about the mean, because noise has to reach that far from 0.

    cache: the loader's cache folder. Raises LoaderError when no sample can be read, or the store does not answer.
    """
    total, count = 0.0, 0
    faults: list[str] = []
    for latent in itertools.islice(_latents(address, recipe, cache, faults), _SAMPLES):
        squares = np.square(latent.astype(np.float64))
        total, count = total + squares.sum(axis=(0, 2, 3)), count + squares[:, 0].size
    if not count:
        first = f"; {len(faults)} cannot be read, the first of them {faults[0]}" if faults else ""
        raise LoaderError(
            f"{address} has no sample to measure the latents' scale on: none has {recipe.data.frames} frames at "
            f"{recipe.data.fps} frames a second, as the recipe's training.data asks{first}"
        )
    std: np.ndarray = np.sqrt(total / count)
    return std


def _latents(address: str, recipe: TrainingRecipe, cache: str, faults: list[str]) -> Iterator[np.ndarray]:
    """The first latent frames of one sample after another, as many as the recipe's `frames` have.

    Each is [latent frames, channels, height, width]. Samples that cannot be read are skipped, as the loader skips them,
    and added to `faults`. A store that does not answer raises LoaderError: its samples exist, and measuring without
    them would give another number.
    """
    import av

    data = recipe.data
    shards, storage = shards_by_name(load(address), data.tiers), shards_storage(address)
    cached = Storage(cache)
    reader = SampleReader(storage, shards, ClipLatents(data.latents, cached))
    frames = latent_frames(data.frames)
    for number, shard in enumerate(shards):
        try:
            entries = read_index(storage, shard, cached).entries
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
            except (FileNotFoundError, av.FFmpegError) as error:  # some FFmpeg errors are OSErrors, but about the clip
                faults.append(f"{where}: {one_line(error)}")
            except OSError as error:
                raise LoaderError(f"{address}: {where} cannot be read: {error}") from error
            except Exception as error:  # a damaged sample may make its reader raise anything
                faults.append(f"{where}: {one_line(error)}")
            else:
                yield latent
