"""Video latents and text embeddings, computed once, that training reads in place of pictures and words."""

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from tasks.clip import Clip
from tasks.guidance_schema import read_guidance
from tasks.latent_codec import CODECS, MAX_CHANNELS, LatentCodec, latent_frames, usable_frames
from tasks.stage import Measurement, MissingBackend, Stage, StageSettings, Unmeasurable, known_backend
from tasks.text_embedding import ENCODERS, TextEncoder

_MAX_TEXT = 20_000  # letters that are read, of a caption of any length
_HALF = float(np.finfo(np.float16).max)
_BEST_DB = 60.0  # what a picture of 8 bits that differs by its rounding alone comes to, in round numbers


class LatentsSettings(StageSettings):
    """What is encoded, and how finely.

    backend: the video codec. channels: numbers a latent pixel has; 16 as in Wan's VAE. short_side: pixels to scale the
    picture's short side to, the clip's own when None. multiple: height and width are cut around the middle to multiples
    of it, so that patches of 2 x 2 latent pixels fit (16) and nothing is filled up (8). text: whose words are embedded,
    the source's caption or the guidance's phrases. text_backend, dim, max_tokens: the text encoder, the numbers a token
    has, and the tokens at most; 4096 and 512 of UMT5 as Wan has it.
    """

    backend: str = "dct"
    channels: int = Field(default=16, ge=1, le=MAX_CHANNELS)
    short_side: int | None = Field(default=None, ge=16, le=2160)
    multiple: Literal[8, 16, 32] = 16
    text: Literal["caption", "guidance"] = "caption"
    text_backend: str = "hashed"
    dim: int = Field(default=256, ge=8, le=8192)
    max_tokens: int = Field(default=64, ge=1, le=4096)

    @field_validator("backend", "text_backend")
    @classmethod
    def _known(cls, backend: str, info: ValidationInfo) -> str:
        return known_backend(backend, CODECS if info.field_name == "backend" else ENCODERS)


class Latents(Stage[LatentsSettings]):
    """Latents of a clip's picture, and the embedding of its text.

    Columns:
        frames: frames with latents, from the first: the largest 4n + 1 in the clip.
        psnr_db: peak signal-to-noise ratio of what decoding gives, over all those frames and their colours, before it
            is rounded to 8 bits, 60 at most; None from a codec that would have to decode to know.
        tokens: of the text's embedding.
    Arrays:
        latent: [latent frames, channels, height / 8, width / 8] float16, each channel of about unit variance; see
            tasks.latent_codec for which frames each covers. Height and width are those of the scaled and cut picture.
        text_embedding: [tokens, dim] float16.
    """

    name: ClassVar[str] = "latents"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": CODECS, "text_backend": ENCODERS}
    columns: ClassVar[dict[str, type]] = {"frames": int, "psnr_db": float, "tokens": int}
    reads: ClassVar[tuple[str, ...]] = ("caption",)
    uses: ClassVar[tuple[str, ...]] = ("guidance",)
    unaligned: ClassVar[tuple[str, ...]] = ("latent", "text_embedding")

    def backend_version(self) -> str:
        versions = (CODECS[self.settings.backend].version(), ENCODERS[self.settings.text_backend].version())
        return ", ".join(version for version in versions if version)

    def check(self) -> None:
        CODECS[self.settings.backend].check()
        ENCODERS[self.settings.text_backend].check()
        try:
            _ = self._codec, self._text_encoder
        except ValueError as error:  # numbers that only the weights know not to be theirs
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
            raise ValueError("latents are to embed the guidance, and no stage `guidance` comes before; see `text`")
        document = clip.found["guidance"].files["guidance.json"]
        return read_guidance(document, f"{clip.record.clip_id}: guidance.json").phrases.text


def _first(clip: Clip, count: int, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """The first `count` frames. Raises Unmeasurable when there are fewer."""
    taken = 0
    for frame in islice(clip.frames(None, size), count):
        yield frame
        taken += 1
    if taken < max(1, count):
        raise Unmeasurable(f"the clip has {taken} frames, and is listed with {clip.record.frames}")


def picture_size(
    width: int, height: int, settings: LatentsSettings
) -> tuple[tuple[int, int] | None, tuple[int, int, int, int]]:
    """What is encoded of a picture of `width` x `height` pixels.

    Returns: (width, height) to scale it to, None for no scaling; and top, left, height, width of the part around the
    middle of that. Raises Unmeasurable when nothing would be left.
    """
    size = None
    if settings.short_side is not None and settings.short_side != min(width, height):
        scale = settings.short_side / min(width, height)
        width, height = round(width * scale), round(height * scale)
        size = (width, height)
    wide, high = (side // settings.multiple * settings.multiple for side in (width, height))
    if not wide or not high:
        raise Unmeasurable(f"a picture of {width}x{height} is smaller than {settings.multiple} pixels")
    return size, ((height - high) // 2, (width - wide) // 2, high, wide)


def _psnr(squared_errors: list[float | None], values: int) -> float | None:
    known = [error for error in squared_errors if error is not None]
    if len(known) < len(squared_errors):
        return None
    mean = math.fsum(known) / values
    return min(_BEST_DB, 10 * math.log10(255**2 / mean)) if mean else _BEST_DB
