"""Reading video: unusable files are refused with the reason, and damage is reported, never hidden."""

import hashlib
import itertools
import random
from pathlib import Path

import av
import numpy as np
import pytest

from data_manifests.storage import Storage
from tasks.cutting.clip_plan import ClipSettings, plan_clips
from tasks.cutting.clip_writer import write_clips
from tasks.cutting.ingest import ingest
from tasks.cutting.shots import Shot
from tasks.media.clip import Clip
from tasks.media.container import MediaError
from tasks.media.decode import BadFrame, probe, read_video
from tasks.media.frames import FrameCache
from tasks.media.upright import DecodedFrame


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp4", "empty file"),
        ("text.mp4", "not a media file"),
        ("noise.mp4", "not a media file"),
        ("audio_only.mp4", "no video stream"),
        ("truncated.mp4", "moov"),
    ],
)
def test_unusable_files_are_refused_with_the_reason(world, name: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        probe(world.path(name))


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    for name, text in {
        "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n",
        "concat.mp4": "ffconcat version 1.0\nfile /etc/hostname\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(MediaError, match="not a media file"):
            probe(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["rotate_90.mp4", "anamorphic.mp4", "odd_size.mp4", "portrait.mp4", "start_5s.mp4", "interlaced.ts"]
)
def test_probe_says_what_a_player_shows(world, name: str) -> None:
    truth, found = world.truth(name), probe(world.path(name))
    assert (found.width, found.height) == (truth.display_width, truth.display_height)
    assert found.fps == pytest.approx(truth.fps, rel=0.01)
    assert found.duration_s == pytest.approx(truth.duration_s, abs=0.1)
    assert found.has_audio == truth.has_audio
    assert found.interlaced == ("interlaced" in name)


def test_cover_art_does_not_count_as_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        art = container.add_stream("mjpeg", rate=1)
        art.width, art.height, art.pix_fmt = 64, 64, "yuvj420p"
        art.disposition = av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=48000)
        container.mux(art.encode(av.VideoFrame(64, 64, "yuvj420p")))
        container.mux(art.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(MediaError, match="no video stream"):
        probe(path)


def _seen(path: Path) -> tuple[dict[int, str], set[int]]:
    """The digest of each good frame by its time in milliseconds, and the times of the bad frames."""
    good, bad = {}, set()
    for event in read_video(path):
        at = round(event.time_s * 1000)
        if isinstance(event, DecodedFrame):
            good[at] = hashlib.sha256(event.frame.to_ndarray().tobytes()).hexdigest()
        elif isinstance(event, BadFrame):
            bad.add(at)
    return good, bad


def _damage(source: Path, to: Path, hit: set[int], how: str) -> None:
    with av.open(str(source)) as given, av.open(str(to), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        packets = [p for p in given.demux(given.streams.video[0]) if p.size]
        for number, packet in enumerate(packets):
            data = bytearray(bytes(packet))
            if number in hit and how == "cut short":
                data = data[: max(8, len(data) // 2)]
            elif number in hit:
                third = max(1, len(data) // 3)
                data[third : 2 * third + 6] = bytes(len(data[third : 2 * third + 6]))
            spoilt = av.Packet(bytes(data))
            spoilt.pts, spoilt.dts, spoilt.duration = packet.pts, packet.dts, packet.duration
            spoilt.time_base, spoilt.is_keyframe, spoilt.stream = packet.time_base, packet.is_keyframe, stream
            made.mux(spoilt)


@pytest.mark.parametrize("how", ["cut short", "zeroed"])
@pytest.mark.parametrize("name", ["b_frames.mp4", "hevc_10bit.mp4"])
def test_damaged_frames_are_reported_and_never_replaced(world, tmp_path: Path, name: str, how: str) -> None:
    whole, _ = _seen(world.path(name))
    for trial in range(2):
        hit = set(random.Random(trial).sample(range(5, len(whole) - 5), 2))
        damaged = tmp_path / f"{trial}.mp4"
        _damage(world.path(name), damaged, hit, how)
        good, bad = _seen(damaged)
        assert bad
        assert not bad & set(good)
        assert set(good) | bad == set(whole), "a frame is neither shown nor reported as bad"
        assert all(whole[at] == digest for at, digest in good.items()), "a frame is shown that was never there"


@pytest.mark.parametrize("name", ["mono_22k.mkv", "start_14h.ts"])
def test_frames_that_a_demuxer_skips_are_bad_and_no_other_frame_is_shown_for_them(
    world, tmp_path: Path, name: str
) -> None:
    whole, _ = _seen(world.path(name))
    data = world.path(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) // 30) + data[len(data) // 2 + len(data) // 30 :])
    good, bad = _seen(path)
    assert bad
    assert all(whole.get(at) == digest for at, digest in good.items())
    moments = sorted([*good, *bad])
    held = [b - a for a, b in itertools.pairwise(moments) if a in good and b in good]
    assert max(held) <= 41, "a frame is held where others are missing"


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_still_image_is_not_taken_for_damage(tmp_path: Path, codec: str) -> None:
    """Frames that hardly change take few bytes, many of them zeros."""
    path = tmp_path / "slide.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        slide = np.full((720, 1280, 3), 255, np.uint8)
        slide[300:400, 200:900] = np.random.default_rng(1).integers(0, 255, (100, 700, 3), np.uint8)
        for _ in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(slide, format="rgb24")))
        container.mux(stream.encode(None))
    good, bad = _seen(path)
    assert len(good) == 50
    assert not bad


def test_frames_and_key_frames_of_a_clip(world, tmp_path: Path) -> None:
    source = ingest(str(world.path("fps_30.mp4")))
    storage, settings = Storage(str(tmp_path)), ClipSettings()
    shot = Shot(0.0, source.duration_s, 0.0, source.duration_s, False, False)
    (record,) = write_clips(
        source, world.path("fps_30.mp4"), plan_clips(source, [shot], [], settings)[0], settings, storage
    )
    clip = Clip(record, Path(storage.path(record.video)), None)
    assert sum(1 for _ in clip.frames()) == clip.record.frames
    some = list(clip.frames(rate=5, size=(64, 36)))
    assert len(some) == clip.record.frames // 5
    assert some[0].shape == (36, 64, 3)
    keys = list(clip.keyframes())
    assert [index for index, _ in keys] == list(range(0, clip.record.frames, 25))
    every = list(clip.frames())
    assert all(np.array_equal(image, every[index]) for index, image in keys)
    # the frame on display in the middle of each fifth of a second
    small = list(clip.frames(size=(64, 36)))
    assert all(np.array_equal(image, small[5 * k + 2]) for k, image in enumerate(some))


def test_a_clip_is_decoded_once_and_shared(world, tmp_path: Path) -> None:
    source = ingest(str(world.path("fps_30.mp4")))
    storage, settings = Storage(str(tmp_path)), ClipSettings()
    shot = Shot(0.0, source.duration_s, 0.0, source.duration_s, False, False)
    (record,) = write_clips(
        source, world.path("fps_30.mp4"), plan_clips(source, [shot], [], settings)[0], settings, storage
    )
    path = Path(storage.path(record.video))
    alone = Clip(record, path, None)
    every, keys, small = list(alone.frames()), list(alone.keyframes()), list(alone.frames(5, (64, 36), rough=True))

    def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
        return len(some) == len(others) and all(map(np.array_equal, some, others))

    for keep_bytes, read in ((10**9, record.frames + len(keys)), (0, 2 * record.frames + 2 * len(keys))):
        decoded = FrameCache(path, keep_bytes)
        clip = Clip(record, path, None, decoded=decoded)
        for _ in range(2):
            assert [index for index, _ in clip.keyframes()] == [index for index, _ in keys]
        assert next(iter(clip.frames())) is not None  # a reader that stops early leaves nothing in memory
        assert same(list(clip.frames()), every)
        assert same(list(clip.frames(5, (64, 36), rough=True)), small)
        assert same([image for _, image in clip.keyframes()], [image for _, image in keys])
        assert decoded.read == read + 1 + (len(keys) if not keep_bytes else 0)
    kept = FrameCache(path, 10**9)
    assert same(list(Clip(record, path, None, decoded=kept).frames()), every)
    assert same([image for _, image in Clip(record, path, None, decoded=kept).keyframes()], [i for _, i in keys])
    assert kept.read == record.frames, "key frames are decoded again although all frames are in memory"


@pytest.mark.parametrize("size", [None, (160, 90)])
def test_rough_frames_are_nearly_the_same_images(world, tmp_path: Path, size: tuple[int, int] | None) -> None:
    source = ingest(str(world.path("talk_3s.mp4")))
    storage, settings = Storage(str(tmp_path)), ClipSettings(min_s=1.0)
    shot = Shot(0.0, 2.0, 0.0, 2.0, False, False)
    (record,) = write_clips(
        source, world.path("talk_3s.mp4"), plan_clips(source, [shot], [], settings)[0], settings, storage
    )
    clip = Clip(record, Path(storage.path(record.video)), None)
    exact, rough, again = (np.stack(list(clip.frames(5, size, rough=r))).astype(int) for r in (False, True, True))
    assert rough.shape == exact.shape
    assert np.array_equal(rough, again)
    assert np.abs(rough - exact).mean() < 4  # of 255
    assert np.abs(rough.mean(axis=3) - exact.mean(axis=3)).mean() < 2
