"""What a training step is given."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one shape. A sample's latent frame 0 is its frame 0, latent frame i >= 1 covers frames 4i-3 to 4i.

    latents: [batch, channels, latent frames, height, width] float32.
    audio: [batch, frames, window, dim] float32, the columns of sound that belong to each frame, of a log-mel
        spectrogram or of Whisper's states (tasks.speech); where there is a speaker_mask, [batch, speakers, frames,
        window, dim], a sound of each speaker's own.
    audio_usable: [batch] bool; where it is False the audio is zeros, and dropped.
    text: [batch, tokens, text_dim] float32, zeros beyond a text's end. text_mask: [batch, tokens] bool, True within.
    speaker_mask: [batch, speakers, latent frames, height, width] bool, the latent pixels of each speaker, who may move;
        None for samples that name no speakers, whose one sound is everybody's.
    drop_text, drop_audio, drop_first, drop_last: [batch] bool, the conditions that the model is to do without: its null
        embedding in place of text or audio, noise in place of a clean first or last frame.
    weight: [batch] float32, 1; 0 for a sample that could not be read and that others stand in for, so that shapes
        never change. A step's loss is the mean over the samples of weight 1.
    keys: clip ids. epochs: for each sample the epoch that it belongs to. tiers: for each sample its narrowest tier.
    fps: frames a second, of all.
    """

    latents: Tensor
    audio: Tensor
    audio_usable: Tensor
    text: Tensor
    text_mask: Tensor
    speaker_mask: Tensor | None
    drop_text: Tensor
    drop_audio: Tensor
    drop_first: Tensor
    drop_last: Tensor
    weight: Tensor
    keys: list[str]
    epochs: list[int]
    tiers: list[str]
    fps: float

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def frames(self) -> int:
        """Frames of the video, 4n + 1."""
        return 4 * (self.latents.shape[2] - 1) + 1

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """On a device, numbers in `dtype` where it is given; masks stay bool and weights float32."""

        def moved(name: str, value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            numbers = value.is_floating_point() and name != "weight"
            return value.to(device=device, dtype=dtype if numbers else None, non_blocking=True)

        return Batch(**{f.name: moved(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)})  # type: ignore[arg-type]

    def split(self, size: int) -> list["Batch"]:
        """In order, in pieces of `size` samples, the last with what is left. The tensors are views."""

        def part(value: object, at: slice) -> object:
            return value[at] if isinstance(value, Tensor | list) else value

        pieces = [slice(at, at + size) for at in range(0, len(self), size)]
        names = [f.name for f in dataclasses.fields(self)]
        return [Batch(**{name: part(getattr(self, name), at) for name in names}) for at in pieces]  # type: ignore[arg-type]
