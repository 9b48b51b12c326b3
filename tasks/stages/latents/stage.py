"""Video latents and text embeddings. They are computed once, and training reads them instead of frames and text."""

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks.media.clip import Clip, Measurement, Unmeasurable
from tasks.networks.latent_geometry import latent_frames, usable_frames
from tasks.stages.base import Stage, StageSettings
from tasks.stages.guidance.schema import read_guidance
from tasks.stages.latents.codec import CODECS, MAX_CHANNELS, LatentCodec
from tasks.stages.latents.text_encoder import ENCODERS, TextEncoder
from tasks.weights.missing import MissingBackend

_MAX_TEXT = 20_000  # characters of a caption that are embedded
_HALF = float(np.finfo(np.float16).max)
_BEST_DB = 60.0  # upper bound; about the PSNR of a frame whose only error is the rounding to 8 bits


class LatentsSettings(StageSettings):
    """The video codec, the text encoder, and what they encode."""

    choices: ClassVar = {"backend": CODECS, "text_backend": ENCODERS}

    backend: str = "dct"
    """The video codec: "dct" for the cosine transform, "wan" for Wan's VAE."""
    channels: int = Field(default=16, ge=1, le=MAX_CHANNELS)
    """Channels of a latent; 16 as in Wan's VAE."""
    short_side: int | None = Field(default=None, ge=16, le=2160)
    """Pixels that the frame's short side is scaled to; None keeps the clip's own size."""
    multiple: Literal[8, 16, 32] = 16
    """Pixels. Height and width are cropped around the centre to multiples of it. Patches of 2 x 2 latent pixels need
    16. With 8, the codec pads nothing."""
    text: Literal["caption", "guidance"] = "caption"
    """The text that is embedded: the source's caption, or the phrases of the stage `guidance`."""
    text_backend: str = "hashed"
    """The text encoder: "hashed" without weights, "umt5" for Wan's UMT5."""
    dim: int = Field(default=256, ge=8, le=8192)
    """Numbers of a token's embedding; UMT5 has 4096."""
    max_tokens: int = Field(default=64, ge=1, le=4096)
    """Tokens of a text, at most; 512 in Wan. The rest of a longer text is dropped."""


class Latents(Stage[LatentsSettings]):
    """The latents of a clip's frames, and the embedding of its text.

    Columns:
        frames: frames with latents, from the first: the largest 4n + 1 in the clip.
        psnr_db: peak signal-to-noise ratio of the decoded frames before they are rounded to 8 bits, over all pixels and
            colours, 60 at most; None from a codec that would have to decode to know it.
        tokens: number of the text's tokens.
    Arrays:
        latent: [latent frames, channels, height / 8, width / 8] float16, each channel of about unit variance. Height
            and width are those of the scaled and cropped frame. tasks.networks.latent_geometry says which frames a
            latent frame covers.
        text_embedding: [tokens, dim] float16.
    """

    name: ClassVar[str] = "latents"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": CODECS, "text_backend": ENCODERS}
    columns: ClassVar[dict[str, type]] = {"frames": int, "psnr_db": float, "tokens": int}
    reads: ClassVar[tuple[str, ...]] = ("caption",)
    uses: ClassVar[tuple[str, ...]] = ("guidance",)
    unaligned: ClassVar[tuple[str, ...]] = ("latent", "text_embedding")

    def check(self) -> None:
        super().check()
        try:
            _ = self._codec, self._text_encoder
        except ValueError as error:  # settings that do not fit the weights
            raise MissingBackend(f"latents: {error}") from None

    @cached_property
    def _codec(self) -> LatentCodec:
        return CODECS[self.settings.backend](self.settings.channels)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        return ENCODERS[self.settings.text_backend](self.settings.dim, self.settings.max_tokens)

    @classmethod
    def needed(cls, settings: LatentsSettings) -> tuple[str, ...]:
        return ("guidance",) if settings.text == "guidance" else ()

    def measure(self, clip: Clip) -> Measurement:
        record, settings = clip.record, self.settings
        size, (top, left, height, width) = picture_size(record.width, record.height, settings)
        count = usable_frames(record.frames)
        part = slice(top, top + height), slice(left, left + width)
        latent: np.ndarray | None = None
        errors: list[float | None] = []
        for encoded in self._codec.encode(frame[part] for frame in _first(clip, count, size)):
            if latent is None:
                latent = np.empty((latent_frames(count), *encoded.latent.shape), np.float16)
            latent[len(errors)] = np.clip(encoded.latent, -_HALF, _HALF)
            errors.append(encoded.squared_error)
        assert latent is not None
        (embeddings,), (mask,) = self._text_encoder.encode([self._text(clip)])
        return Measurement(
            {
                "frames": count,
                "psnr_db": _psnr(errors, count * height * width * 3),
                "tokens": int(mask.sum()),
            },
            {"latent": latent, "text_embedding": embeddings[mask].astype(np.float16)},
        )

    def _text(self, clip: Clip) -> str:
        if self.settings.text == "caption":
            return str(clip.record.metadata.get("caption") or "")[:_MAX_TEXT]
        if "guidance" not in clip.found:
            raise ValueError(
                "latents.text is `guidance`, and no stage `guidance` comes before; add that stage, or set text: caption"
            )
        document = clip.found["guidance"].files["guidance.json"]
        return read_guidance(document, f"{clip.record.clip_id}: guidance.json").phrases.text


def _first(clip: Clip, count: int, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """The first `count` frames. size: (width, height) to scale to. Raises Unmeasurable where there are fewer."""
    taken = 0
    for frame in islice(clip.frames(None, size), count):
        yield frame
        taken += 1
    if taken < max(1, count):
        raise Unmeasurable(f"the clip has {taken} frames, but its record says {clip.record.frames}")


def picture_size(
    width: int, height: int, settings: LatentsSettings
) -> tuple[tuple[int, int] | None, tuple[int, int, int, int]]:
    """How frames are scaled and cropped before they are encoded.

    width, height: of the clip's frames in pixels.

    Returns: (width, height) to scale to, None for no scaling; and (top, left, height, width) of the central crop of
    the scaled frame. Raises Unmeasurable where nothing would be left.
    """
    size = None
    if settings.short_side is not None and settings.short_side != min(width, height):
        scale = settings.short_side / min(width, height)
        width, height = round(width * scale), round(height * scale)
        size = (width, height)
    wide, high = (side // settings.multiple * settings.multiple for side in (width, height))
    if not wide or not high:
        raise Unmeasurable(f"a frame of {width}x{height} is smaller than {settings.multiple} pixels")
    return size, ((height - high) // 2, (width - wide) // 2, high, wide)


def _psnr(squared_errors: list[float | None], values: int) -> float | None:
    """Peak signal-to-noise ratio in dB. squared_errors: sums over parts of the `values` numbers; None where unknown."""
    known = [error for error in squared_errors if error is not None]
    if len(known) < len(squared_errors):
        return None
    mean = math.fsum(known) / values
    return min(_BEST_DB, 10 * math.log10(255**2 / mean)) if mean else _BEST_DB
