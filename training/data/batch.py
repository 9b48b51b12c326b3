"""The input of a training step."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.networks.latent_geometry import video_frames


@dataclass(frozen=True)
class Batch:
    """Samples of one shape.

    Latent frame 0 of a sample covers its frame 0. Latent frame i >= 1 covers frames 4i - 3 to 4i.
    """

    latents: Tensor
    """[batch, channels, latent frames, height, width] float32."""
    audio: Tensor
    """[batch, frames, window, dim] float32, the columns of sound of each frame, from a log-mel spectrogram or Whisper's
    states (tasks.stages.speech). With a speaker_mask: [batch, speakers, frames, window, dim], one sound a speaker."""
    audio_usable: Tensor
    """[batch] bool. Where it is False the audio is zeros, and dropped."""
    text: Tensor
    """[batch, tokens, text_dim] float32, zeros beyond a text's end."""
    text_mask: Tensor
    """[batch, tokens] bool, True for the tokens of the text."""
    speaker_mask: Tensor | None
    """[batch, speakers, latent frames, height, width] bool, the latent pixels of each speaker, who may move. None for
    samples that name no speakers. Their one sound belongs to all people in the video."""
    drop_text: Tensor
    """[batch] bool, samples whose text the model replaces by its null embedding."""
    drop_audio: Tensor
    """[batch] bool, samples whose sound the model replaces by its null embedding."""
    drop_first: Tensor
    """[batch] bool, samples whose first latent frame is noisy instead of clean."""
    drop_last: Tensor
    """[batch] bool, samples whose last latent frame is noisy instead of clean."""
    weight: Tensor
    """[batch] float32, 1 or 0. A sample that could not be read has weight 0 and holds a copy of another sample, so that
    shapes never change. A step's loss is the mean over the samples of weight 1."""
    keys: list[str]
    """Clip ids."""
    epochs: list[int]
    """The epoch of each sample."""
    tiers: list[str]
    """The narrowest tier of each sample."""
    fps: float
    """Frames a second, of all samples."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def frames(self) -> int:
        """Video frames of a sample, 4n + 1."""
        return video_frames(self.latents.shape[2])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """The batch on a device. `dtype`, where given, is the new type of floats. Masks stay bool, weights float32."""

        def moved(name: str, value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            converts = value.is_floating_point() and name != "weight"
            return value.to(device=device, dtype=dtype if converts else None, non_blocking=True)

        return Batch(**{f.name: moved(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)})  # type: ignore[arg-type]

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` samples, in order. The last one may be smaller. Their tensors are views."""

        def part(value: object, rows: slice) -> object:
            return value[rows] if isinstance(value, Tensor | list) else value

        slices = [slice(first, first + size) for first in range(0, len(self), size)]
        names = [f.name for f in dataclasses.fields(self)]
        return [Batch(**{name: part(getattr(self, name), rows) for name in names}) for rows in slices]  # type: ignore[arg-type]
