"""Puts the arrays of samples together into one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from training.data.batch import Batch
from training.data.buckets import SamplePlace
from training.data.sample_reader import Bucket, SampleArrays
from training.data.shard_index import Entry


class BatchSample(NamedTuple):
    """A sample that a planned batch will hold."""

    entry: Entry
    spare: int
    """Latent frames that the clip has beyond those of the batch: the last frame at which its window may begin."""


def empty_batch(
    bucket: Bucket, text_tokens: int, samples: Sequence[tuple[SamplePlace, BatchSample]], dropped: torch.Tensor
) -> Batch:
    """A batch of zeros for these samples. dropped: [batch, 4] bool, of text, audio, first frame and last frame."""
    count = len(samples)

    def all_false(*shape: int) -> torch.Tensor:
        return torch.zeros(count, *shape, dtype=torch.bool)

    latent_shape = (bucket.frames, bucket.height, bucket.width)
    return Batch(
        latents=torch.zeros(count, bucket.channels, *latent_shape),
        audio=torch.zeros(count, *bucket.audio),
        audio_usable=all_false(),
        text=torch.zeros(count, text_tokens, bucket.text_dim),
        text_mask=all_false(text_tokens),
        speaker_mask=all_false(bucket.speakers, *latent_shape) if bucket.speakers else None,
        drop_text=dropped[:, 0].clone(),
        drop_audio=dropped[:, 1].clone(),
        drop_first=dropped[:, 2].clone(),
        drop_last=dropped[:, 3].clone(),
        weight=torch.ones(count),
        keys=[sample.entry.key for _, sample in samples],
        epochs=[place.epoch for place, _ in samples],
        tiers=[sample.entry.tier for _, sample in samples],
        fps=float(bucket.fps),
    )


def fill_row(batch: Batch, row: int, arrays: SampleArrays, max_tokens: int) -> None:
    """Write a sample's arrays into one row of a batch. Text beyond `max_tokens` is cut off."""
    batch.latents[row] = torch.from_numpy(arrays.latent).transpose(0, 1)
    tokens = min(len(arrays.text), max_tokens)
    batch.text[row, :tokens] = torch.from_numpy(arrays.text[:tokens])
    batch.text_mask[row, :tokens] = True
    if arrays.audio is not None:
        batch.audio[row] = torch.from_numpy(arrays.audio)
        batch.audio_usable[row] = True
    if batch.speaker_mask is not None and arrays.speaker_mask is not None:
        batch.speaker_mask[row] = torch.from_numpy(arrays.speaker_mask)


def not_finite_rows(batch: Batch) -> dict[int, str]:
    """Rows whose latents, text or sound hold numbers that are not finite, each with the message for its sample."""
    faults: dict[int, str] = {}
    for name, numbers in (("latents", batch.latents), ("text", batch.text), ("sound", batch.audio)):
        # a sum is finite only if all its numbers are
        for row in torch.nonzero(~numbers.flatten(1).sum(1).isfinite()).flatten().tolist():
            faults.setdefault(row, f"its {name} have numbers that are not finite")
    return faults


def replace_unreadable(batch: Batch) -> None:
    """Copy the first readable sample over each unreadable one. All become zeros where no sample could be read."""
    readable = torch.nonzero(batch.weight).flatten()
    for row in torch.nonzero(batch.weight == 0).flatten():
        for numbers in (batch.latents, batch.audio, batch.audio_usable, batch.text, batch.text_mask):
            numbers[row] = numbers[readable[0]] if len(readable) else 0
        if batch.speaker_mask is not None:
            batch.speaker_mask[row] = batch.speaker_mask[readable[0]] if len(readable) else False
