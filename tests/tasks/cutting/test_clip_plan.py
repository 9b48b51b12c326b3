"""Planned clips: whole frames of one shot, within the bounds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_manifests.strict import RecipeError, validate
from tasks.cutting.clip_plan import ClipSettings, Skipped, clip_size, clips_of, first_clips, plan_clips
from tasks.cutting.ingest import SourceInfo
from tasks.cutting.shots import Interval, Shot

SOURCE = SourceInfo(
    container="mov", duration_s=100.0, start_s=0.0, video_codec="h264", pix_fmt="yuv420p", width=1920, height=1080,
    fps=25.0, rotation=0, interlaced=False, video_start_s=0.0, audio_codec="aac", audio_rate=48000, audio_channels=2,
    audio_start_s=0.0, video_streams=1, audio_streams=1, uri="a.mp4", source_id="0123456789abcdef", sha256="0" * 64,
    size_bytes=1, signature="1-1",
)  # fmt: skip


@st.composite
def _shots(draw: st.DrawFn) -> list[Shot]:
    lengths = draw(st.lists(st.integers(1, 2400), min_size=1, max_size=6))
    edges = [0.0, *(round(frame / 30, 6) for frame in itertools.accumulate(lengths))]
    shots = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        dark = draw(st.sampled_from([0.0, 0.0, 0.4]))
        clear = (start + dark, end - dark) if end - start > 2 * dark else (end, end)
        shots.append(Shot(start, end, *clear, number > 0, number < len(lengths) - 1))
    return shots


@given(
    shots=_shots(),
    fps=st.sampled_from([24, 25, 30]),
    bounds=st.sampled_from([(5.0, 20.0), (3.0, 15.0), (8.0, 10.0), (2.5, 2.6), (1.0, 1.0)]),
    trim_s=st.sampled_from([0.0, 0.12, 0.5]),
)
@hypothesis_settings(deadline=None)
def test_clips_are_whole_frames_within_the_bounds_and_inside_one_shot(
    shots: list[Shot], fps: int, bounds: tuple[float, float], trim_s: float
) -> None:
    settings = ClipSettings(fps=fps, min_s=bounds[0], max_s=bounds[1], trim_s=trim_s)
    clips, skipped = plan_clips(SOURCE, shots, [], settings)
    assert len({clip.clip_id for clip in clips}) == len(clips)
    for clip in clips:
        assert bounds[0] - 1e-6 <= clip.duration_s <= bounds[1] + 1e-6
        assert clip.end_s - clip.start_s == pytest.approx(clip.frames / fps, abs=3e-6)
        (shot,) = (shot for shot in shots if shot.start_s <= clip.start_s < shot.end_s)
        first, last = clip.start_s + 0.5 / fps, clip.end_s - 0.5 / fps
        assert shot.clear_from_s <= first
        assert last < shot.clear_to_s
        if shot.cut_before and shot.clear_from_s == shot.start_s:
            assert clip.start_s >= shot.start_s + trim_s - 1e-6
        if shot.cut_after and shot.clear_to_s == shot.end_s:
            assert clip.end_s <= shot.end_s - trim_s + 0.1 / fps + 1e-6
    for one, other in itertools.pairwise(clips):
        assert one.end_s <= other.start_s
    # every part that no clip shows is reported, except a part of a frame at the end of a shot
    accounted_s = sum(c.end_s - c.start_s for c in clips) + sum(s.end_s - s.start_s for s in skipped)
    assert accounted_s == pytest.approx(shots[-1].end_s, abs=3 * len(shots) / fps)


@given(frames=st.integers(1, 20_000), seconds=st.sampled_from([(5.0, 20.0), (3.0, 15.0), (2.0, 10.0)]))
@hypothesis_settings(deadline=None)
def test_longer_shots_are_split_and_no_short_rest_is_left(frames: int, seconds: tuple[float, float]) -> None:
    settings = ClipSettings(fps=25, min_s=seconds[0], max_s=seconds[1])
    end = frames / 25
    clips, skipped = plan_clips(SOURCE, [Shot(0.0, end, 0.0, end, False, False)], [], settings)
    lengths = [clip.frames for clip in clips]
    if end < seconds[0]:
        assert not clips
        assert skipped == [Skipped(0.0, end, f"shorter than min_s {seconds[0]:g}")]
    else:
        assert sum(lengths) == frames
        assert len(lengths) == -(-frames // settings.max_frames)
        assert not skipped
        *full, first, last = [settings.max_frames, *lengths]
        assert set(full) <= {settings.max_frames}
        assert first == settings.max_frames or 0 <= first - last <= 1


@given(
    frames=st.integers(1, 2000),
    more=st.integers(0, 2000),
    bounds=st.tuples(st.integers(1, 60), st.integers(0, 60)),
    cut=st.booleans(),
)
@hypothesis_settings(deadline=None)
def test_the_first_clips_of_a_shot_do_not_depend_on_its_length(
    frames: int, more: int, bounds: tuple[int, int], cut: bool
) -> None:
    low, high = bounds[0], sum(bounds)
    settings = ClipSettings(fps=25, min_s=low / 25, max_s=high / 25)
    seen, whole = (Shot(0.0, n / 25, 0.0, n / 25, False, after) for n, after in ((frames, True), (frames + more, cut)))
    begins, clips = first_clips(SOURCE, seen, settings), clips_of(SOURCE, whole, settings)
    assert clips[: len(begins)] == begins
    # and clips hold as many frames of the shot as an even split would
    usable = frames + more - 3 * cut
    parts = -(-usable // high)
    even = usable if usable >= low and usable // parts >= low else high * (parts - 1)
    assert sum(clip.frames for clip in clips) == (even if usable >= low else 0)


def test_parts_that_no_clip_shows_are_listed_with_the_reason() -> None:
    shots = [
        Shot(0.0, 8.0, 0.0, 7.5, False, True),
        Shot(8.0, 10.0, 8.5, 10.0, True, True),
        Shot(10.0, 12.0, 11.0, 11.0, True, False),
    ]
    clips, skipped = plan_clips(SOURCE, shots, [Interval(12.0, 13.0)], ClipSettings(min_s=5, max_s=20))
    assert [(clip.start_s, clip.end_s) for clip in clips] == [(0.0, 7.48)]
    assert [(s.start_s, s.end_s, s.reason) for s in skipped] == [
        (7.5, 8.0, "black or fading"),
        (8.0, 8.5, "black or fading"),
        (8.5, 10.0, "shorter than min_s 5"),
        (10.0, 11.0, "black or fading"),
        (11.0, 12.0, "black or fading"),
        (12.0, 13.0, "cannot be decoded"),
    ]


def test_a_clip_id_depends_on_what_decides_the_clips_bytes_and_nothing_else() -> None:
    shot = [Shot(0.0, 10.0, 0.0, 10.0, False, False)]

    def name(**changed: object) -> str:
        return plan_clips(SOURCE, shot, [], ClipSettings(**changed))[0][0].clip_id  # type: ignore[arg-type]

    assert name() == name(min_s=3.0) == name(max_s=15.0) == name(trim_s=0.5)
    names = [name(), name(fps=24), name(short_side=360), name(qp=22), name(preset="medium"), name(max_s=6.0)]
    assert len(set(names)) == len(names)


@given(width=st.integers(2, 8000), height=st.integers(2, 8000), side=st.sampled_from([256, 480, 720]))
@hypothesis_settings(deadline=None)
def test_clips_are_even_and_never_enlarged(width: int, height: int, side: int) -> None:
    w, h = clip_size(width, height, side)
    assert w % 2 == h % 2 == 0
    assert 2 <= w <= max(width, 2)
    assert 2 <= h <= max(height, 2)
    assert min(w, h) == (side if min(width, height) >= side else min(width, height) // 2 * 2)


def test_bounds_between_which_no_frame_fits_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"no whole number of frames lies between min_s 5\.01 and max_s 5\.02"):
        validate(ClipSettings, {"min_s": 5.01, "max_s": 5.02}, "a.yaml")
