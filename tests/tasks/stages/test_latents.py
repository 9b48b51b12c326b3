"""The stage `latents`: scaling and cropping, the error of decoding, and the text's embedding."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import Clip, Measurement, Unmeasurable
from tasks.stages.guidance.schema import GuidanceError
from tasks.stages.guidance.settings import GuidanceSettings
from tasks.stages.guidance.stage import GuidanceStage
from tasks.stages.latents.codec import CosineCodec
from tasks.stages.latents.stage import Latents, LatentsSettings, picture_size
from tasks.stages.latents.text_encoder import HashedText

ClipOf = Callable[..., Clip]
CAPTION = "A woman in a red dress talks to the camera in an office."


def measured(clip: Clip, **options: Any) -> Measurement:
    stage = Latents(LatentsSettings(backend="dct", **options))
    stage.check()
    return stage.measure(clip)


def test_decoding_has_the_psnr_that_the_stage_says(clip_of: ClipOf) -> None:
    clip = clip_of("talk_3s.mp4", caption=CAPTION)
    found = measured(clip)
    count = found.columns["frames"]
    assert type(count) is int and clip.record.frames - 4 < count <= clip.record.frames and count % 4 == 1
    latent = found.arrays["latent"]
    assert latent.dtype == np.float16 and latent.flags.c_contiguous
    _, (top, left, height, width) = picture_size(clip.record.width, clip.record.height, LatentsSettings(backend="dct"))
    assert latent.shape == ((count + 3) // 4, 16, height // 8, width // 8)
    pairs = zip(clip.frames(), CosineCodec(16).decode(latent, height, width), strict=False)
    squares = [np.square(a[top : top + height, left : left + width].astype(int) - b).mean() for a, b in pairs]
    assert len(squares) == count
    psnr = 10 * np.log10(255**2 / np.mean(squares))
    assert found.columns["psnr_db"] == pytest.approx(psnr, abs=0.2)
    assert psnr > 30


def test_more_channels_lose_less_and_a_second_measurement_is_equal(clip_of: ClipOf) -> None:
    clip = clip_of("talk_3s.mp4", caption=CAPTION)
    few, many = measured(clip, short_side=144), measured(clip, short_side=144, channels=96)
    assert many.columns["psnr_db"] > few.columns["psnr_db"] + 3  # type: ignore[operator]
    assert many.arrays["latent"].shape[1:] == (96, 18, few.arrays["latent"].shape[3])
    # the same channels, up to a last digit of float16: see test_latent_codec.py
    np.testing.assert_allclose(many.arrays["latent"][:, :16], few.arrays["latent"], rtol=1e-3, atol=1e-5)
    again = measured(clip, short_side=144)
    assert again.columns == few.columns
    assert again.arrays["latent"].tobytes() == few.arrays["latent"].tobytes()


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    multiple=st.sampled_from([8, 16, 32]),
    short_side=st.none() | st.integers(16, 2160),
)
def test_the_encoded_crop_is_central_and_of_the_asked_size(
    width: int, height: int, multiple: Any, short_side: int | None
) -> None:
    options = LatentsSettings(backend="dct", multiple=multiple, short_side=short_side)
    try:
        size, (top, left, high, wide) = picture_size(width, height, options)
    except Unmeasurable:
        assert min(width, height, short_side or width) < multiple
        return
    full_width, full_height = size or (width, height)
    assert min(full_width, full_height) == (short_side or min(width, height))
    assert high % multiple == wide % multiple == 0
    assert 0 <= full_height - high < multiple and 0 <= full_width - wide < multiple
    assert top == (full_height - high) // 2 and left == (full_width - wide) // 2


def test_the_embedded_text_is_the_caption_or_the_guidances_phrases(clip_of: ClipOf) -> None:
    clip = clip_of("talk_3s.mp4", caption=CAPTION)
    options: dict[str, Any] = {"short_side": 16, "dim": 32, "max_tokens": 48}
    found = measured(clip, **options)
    ((expected,), _) = HashedText(32, 48).encode([CAPTION])
    assert found.columns["tokens"] == 14
    np.testing.assert_array_equal(found.arrays["text_embedding"], expected.astype(np.float16))
    guidance = GuidanceStage(GuidanceSettings(backend="templates")).measure(clip)
    guided = measured(dataclasses.replace(clip, found={"guidance": guidance}), text="guidance", **options)
    ((expected,), _) = HashedText(32, 48).encode([str(guidance.columns["phrases"])])
    np.testing.assert_array_equal(guided.arrays["text_embedding"], expected.astype(np.float16))
    with pytest.raises(ValueError, match="no stage `guidance` comes before"):
        measured(clip, text="guidance", **options)
    broken = Measurement({}, files={"guidance.json": b"{}"})
    with pytest.raises(GuidanceError, match=r"guidance\.json: analysis: Field required"):
        measured(dataclasses.replace(clip, found={"guidance": broken}), text="guidance", **options)


def test_a_clip_with_fewer_frames_than_its_record_cannot_be_measured(clip_of: ClipOf) -> None:
    clip = clip_of("talk_3s.mp4")
    listed = dataclasses.replace(clip.record, frames=clip.record.frames + 8)
    message = f"the clip has {clip.record.frames} frames, but its record says {listed.frames}"
    with pytest.raises(Unmeasurable, match=message):
        measured(dataclasses.replace(clip, record=listed), short_side=16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"backend": "dtc"}, r"backend: unknown backend 'dtc'; did you mean 'dct'\?"),
        ({"backend": "dct", "text_backend": "hash"}, r"text_backend: unknown backend 'hash'; did you mean 'hashed'\?"),
        ({"backend": "dct", "channels": 769}, "channels: "),
        ({"backend": "dct", "chanels": 16}, r"unknown key 'chanels'; did you mean 'channels'\?"),
    ],
)
def test_wrong_settings_are_refused_by_name(content: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(LatentsSettings, content, "here")


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(max_size=200), max_size=4), dim=st.integers(8, 64), most=st.integers(1, 20))
def test_any_text_has_tokens_that_do_not_depend_on_the_batch(texts: list[str], dim: int, most: int) -> None:
    encoder = HashedText(dim, most)
    embeddings, mask = encoder.encode(texts)
    assert embeddings.shape == (*mask.shape, dim) and mask.shape[0] == len(texts)
    assert embeddings.dtype == np.float32 and mask.dtype == bool
    assert not embeddings[~mask].any()
    np.testing.assert_allclose(np.linalg.norm(embeddings[mask], axis=1), np.sqrt(dim), rtol=1e-5)
    for row, text in enumerate(texts):
        assert 1 <= mask[row].sum() <= most
        (alone,), (kept,) = encoder.encode([text])
        np.testing.assert_array_equal(embeddings[row, mask[row]], alone[kept])


def test_words_of_similar_spelling_have_similar_embeddings() -> None:
    (words,), _ = HashedText(256, 64).encode(["Smiles smiling table SMILES"])
    smiles, smiling, table, same, end = words
    angles = [float(smiles @ other) / 256 for other in (smiling, table, same, end)]
    assert angles[2] == pytest.approx(1.0)
    assert angles[0] > 0.3 > max(abs(angles[1]), abs(angles[3]))


def test_scripts_without_spaces_are_split_into_characters() -> None:
    _, mask = HashedText(64, 64).encode(["她在说话", "она говорит", "彼女はspeaks", "", "\ud800 !?"])
    assert mask.sum(axis=1).tolist() == [5, 3, 5, 1, 1]


def test_the_hash_does_not_depend_on_the_process() -> None:
    """Stored embeddings have to equal those that another process computes later."""
    (embedding,), _ = HashedText(8, 4).encode(["hello"])
    counts = embedding[0] / np.abs(embedding[0]).max() * 3
    np.testing.assert_allclose(counts, [0, 3, -3, 0, -1, -1, -1, -3], atol=1e-5)
