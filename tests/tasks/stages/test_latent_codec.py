"""The cosine codec: lossless with all channels, equal results in pieces, and a correct error."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.networks.latent_geometry import latent_frames, usable_frames
from tasks.stages.latents.codec import CODECS, MAX_CHANNELS, CosineCodec


def noise(frames: int, height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8))


def film(frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames with smooth moving colour waves, which are closer to natural video than noise."""
    y, x = np.mgrid[:height, :width] / 40
    for k in range(frames):
        shades = [120 + 60 * np.sin(x + 0.03 * k) + 50 * np.cos(y * x / 9 + c) for c in (0.0, 0.2, 0.5)]
        yield np.stack(shades, axis=2).clip(0, 255).astype(np.uint8)


def latents(codec: CosineCodec, frames: list[np.ndarray]) -> list[np.ndarray]:
    return [encoded.latent for encoded in codec.encode(frames)]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 3), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_all_channels_are_lossless(n: int, height: int, width: int, seed: int) -> None:
    frames = noise(4 * n + 1, height, width, seed)
    codec = CosineCodec(MAX_CHANNELS)
    found = latents(codec, frames)
    assert [latent.shape for latent in found] == [(MAX_CHANNELS, -(-height // 8), -(-width // 8))] * (n + 1)
    np.testing.assert_array_equal(list(codec.decode(found, height, width)), frames)


@settings(max_examples=25, deadline=None)
@given(channels=st.integers(1, MAX_CHANNELS), seed=st.integers(0, 99))
def test_the_squared_error_is_that_of_decoding(channels: int, seed: int) -> None:
    # values so near to grey that decoding stays within 0..255 and nothing is clipped
    frames = [(frame // 8 + 112).astype(np.uint8) for frame in noise(5, 16, 24, seed)]
    codec = CosineCodec(channels)
    encoded = list(codec.encode(frames))
    decoded = np.array(list(codec.decode([e.latent for e in encoded], 16, 24)), np.float64)
    squares = np.square(decoded - frames).sum(axis=(1, 2, 3))
    rounding = 16 * 24 * 3 / 12  # expected error of one frame
    for found, true, count in zip(encoded, (squares[0], squares[1:].sum()), (1, 4), strict=True):
        assert found.squared_error is not None
        if channels == MAX_CHANNELS:
            assert found.squared_error < 1
        else:
            assert found.squared_error == pytest.approx(true, rel=0.1, abs=2 * rounding * count)


def test_more_channels_lose_less() -> None:
    frames = list(film(9, 64, 96))
    lost = [sum(e.squared_error or 0.0 for e in CosineCodec(n).encode(frames)) for n in (1, 3, 16, 32, 48, 96, 768)]
    assert lost == sorted(lost, reverse=True)
    assert lost[2] < 0.02 * lost[0]


@pytest.mark.parametrize("channels", [16, 96])
def test_a_video_in_pieces_gives_the_same_bytes_as_at_once(channels: int) -> None:
    frames = list(film(41, 72, 104))
    codec = CosineCodec(channels)
    whole = latents(codec, frames)
    # after the first frame, each group of four frames is encoded alone
    for i in (1, 4, 10):
        alone = latents(codec, [frames[0], *frames[4 * i - 3 : 4 * i + 1]])
        assert alone[1].tobytes() == whole[i].tobytes()
    assert latents(codec, frames[:21])[5].tobytes() == whole[5].tobytes()
    pieces = [*codec.decode(whole[:3], 72, 104)]
    np.testing.assert_array_equal(pieces, list(codec.decode(whole, 72, 104))[:9])


def test_latents_come_as_soon_as_their_frames_are_read() -> None:
    taken = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal taken
        for frame in film(13, 16, 16):
            taken += 1
            yield frame

    seen = [taken for _ in CosineCodec(16).encode(counted())]
    assert seen == [1, 5, 9, 13]


def test_memory_does_not_grow_with_the_length_of_a_video() -> None:
    def peak(frames: int) -> int:
        codec = CosineCodec(16)
        tracemalloc.start()
        stream = (encoded.latent for encoded in codec.encode(film(frames, 120, 160)))
        count = sum(1 for _ in codec.decode(stream, 120, 160))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == frames
        return most

    peak(9)
    assert peak(201) < 1.1 * peak(21)


def test_channels_have_about_unit_variance_and_one_meaning() -> None:
    frames = list(film(17, 128, 160))
    codec = CosineCodec(16)
    found = np.array(latents(codec, frames))
    assert 0.1 < found[:, 0].std() < 2.0
    # a still video has the same latents in the first frame as in later ones
    still = latents(codec, [frames[0]] * 9)
    np.testing.assert_allclose(still[0], still[1], atol=1e-4)
    # fewer channels are the first ones of more channels, up to float32 rounding: on some processors the BLAS library
    # sums a narrower product in another order
    np.testing.assert_allclose(found[:, :5], np.array(latents(CosineCodec(5), frames)), rtol=0, atol=1e-5)


def test_grey_is_zero() -> None:
    grey = [np.full((16, 16, 3), 128, np.uint8)] * 5
    assert max(np.abs(latent).max() for latent in latents(CosineCodec(MAX_CHANNELS), grey)) < 1e-3


def test_the_basis_equals_the_transform() -> None:
    """Training may use the basis as the kernel of a convolution."""
    frames = noise(5, 16, 24)
    codec = CosineCodec(48)
    block = np.stack(frames[1:])[:, 8:16, 16:24].astype(np.float32) - 128
    by_hand = np.einsum("kctyx,tyxc->k", codec.basis, block)
    np.testing.assert_allclose(latents(codec, frames)[1][:, 1, 2], by_hand, atol=1e-3)


def test_a_size_that_is_no_multiple_of_8_is_restored() -> None:
    frames = list(film(5, 50, 75))
    codec = CosineCodec(96)
    decoded = list(codec.decode(latents(codec, frames), 50, 75))
    assert [frame.shape for frame in decoded] == [(50, 75, 3)] * 5
    assert np.abs(np.array(decoded, int) - frames).mean() < 1.0


@pytest.mark.parametrize("count", [0, 2, 3, 4, 8])
def test_another_number_of_frames_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^{count} frames: a video to encode has 4n \+ 1"):
        latents(CosineCodec(16), noise(count, 8, 8))


def test_frames_and_latents_of_another_shape_are_refused() -> None:
    codec = CosineCodec(16)
    with pytest.raises(ValueError, match=r"frame 1 is uint8 \[8, 9, 3\] after \[8, 8, 3\]"):
        latents(codec, [*noise(1, 8, 8), *noise(4, 8, 9)])
    with pytest.raises(ValueError, match=r"frame 0 is float32 \[8, 8, 3\]"):
        latents(codec, [np.zeros((8, 8, 3), np.float32)])
    with pytest.raises(ValueError, match=r"frame 0 is uint8 \[8, 8\]"):
        latents(codec, [np.zeros((8, 8), np.uint8)])
    with pytest.raises(ValueError, match=r"latent frame 0 is \[15, 1, 1\]; 8x8 pixels take \[16, 1, 1\]"):
        next(codec.decode([np.zeros((15, 1, 1), np.float32)], 8, 8))
    with pytest.raises(ValueError, match="769 channels: a block of 4x8x8 pixels has 1 to 768"):
        CODECS["dct"](769)


@given(st.integers(0, 10_000))
def test_usable_frames_are_the_largest_4n_plus_1(frames: int) -> None:
    usable = usable_frames(frames)
    assert usable <= frames < usable + 4 or frames == usable == 0
    assert latent_frames(usable) == (usable + 3) // 4
