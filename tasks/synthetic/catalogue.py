"""The list of all files that can be made: films, changed films and broken files."""

from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from tasks.synthetic.damage import Bytes, Changed, copy_of, cut_off, overwrite, without_pictures
from tasks.synthetic.encode import AudioFormat, VideoFormat
from tasks.synthetic.faults import faults
from tasks.synthetic.film import Film
from tasks.synthetic.scene import Appearance

NTSC = Fraction(1000, 1001)

OPUS = AudioFormat("libopus", layout="stereo", sample_format="s16")
MP2 = AudioFormat("mp2", layout="stereo", sample_format="s16")
MP3 = AudioFormat("libmp3lame", delay=1105)
File = Film | Changed | Bytes


MEDIUM_SIZE = {"width": 480, "height": 270}


def _talk() -> list[Film]:
    """Talking people in several framings, and scenes without a face or without speech."""

    def film(name: str, seconds: float, look: Appearance, **more: Any) -> Film:
        return Film(name, ("talk",), ((seconds, look),), **more)

    shaken, frozen = ((2.0, 8.0),), ((3.0, 8.0),)
    evenly, slowly = "nobody; the camera turns evenly", "nobody, but a narrator; the camera turns slowly"
    return [
        film("talk_office.mp4", 10, Appearance("upper body", "office"), audio=AudioFormat(layout="stereo")),
        film("talk_medium.mp4", 8, Appearance("medium", "park", 120, True), voice="cleo"),
        film("talk_full.mp4", 8, Appearance("full", "studio", 200), voice="ben"),
        film("talk_long.mp4", 8, Appearance("long", "studio", 320), width=960, height=720, voice="dan"),
        film("talk_hd.mp4", 6, Appearance("upper body", "studio", 60), width=1280, height=720),
        film("talk_45s.mp4", 45, Appearance("upper body", "park", 240, True), voice="dan", events=True, **MEDIUM_SIZE),
        film("talk_3s.mp4", 3, Appearance("upper body", "studio", 300), voice="cleo", **MEDIUM_SIZE),
        film("nobody.mp4", 8, Appearance("", "studio", pan_speed=0.04), voice="ben", notes=slowly, **MEDIUM_SIZE),
        film("frozen.mp4", 10, Appearance("upper body", "office", 120, frozen_s=frozen), **MEDIUM_SIZE),
        film("shake.mp4", 10, Appearance("medium", "park", 40, shake_s=shaken), voice="ben", **MEDIUM_SIZE),
        film("pan.mp4", 8, Appearance("", "office", pan_speed=0.15), voice="", notes=evenly, **MEDIUM_SIZE),
        film(
            "silent.mp4",
            8,
            Appearance("upper body", "night", 200, True),
            voice="",
            notes="room noise only",
            **MEDIUM_SIZE,
        ),
        film("speech_sparse.mp4", 12, Appearance("upper body", "office", 280), voice="ben", pause_s=2.0, **MEDIUM_SIZE),
    ]


def _cuts() -> list[Film]:
    """Films of several shots, and pans that are no cuts."""

    def film(name: str, *shots: tuple[float, Appearance], joins: tuple[str, ...] = (), **more: Any) -> Film:
        return Film(name, ("cuts",), shots, joins, **({"events": True} | MEDIUM_SIZE | more))

    a, b = Appearance("upper body", "office"), Appearance("upper body", "park", 120, True)
    c, d = Appearance("medium", "studio", 200), Appearance("full", "night", 60, True)
    nearer, beside = Appearance("upper body", "office", zoom=1.7), Appearance("upper body", "office", 120, True, x=0.4)
    past = Appearance("medium", "park", pan_from=0.2, pan_speed=0.12, x=0.9)
    reordered = VideoFormat(rate=30 * NTSC, b_frames=2, options={"preset": "veryfast"})
    ticks = VideoFormat(time_base=Fraction(1, 90_000))
    return [
        film("cuts_plain.mp4", (3.2, a), (4, b), (2.8, c), (3, d), width=640, height=360),
        film("cuts_nearer.mp4", (4, a), (4, nearer), (4, a), notes="the same person and place, nearer"),
        film("cuts_beside.mp4", (4, a), (4, beside), (4, a), notes="another person in the same place"),
        film("cuts_quick.mp4", (4, b), (1, c), (1, a), (5, d), notes="cuts 1 s apart"),
        film("cuts_2997.mp4", (4, a), (4, d), video=reordered),
        film("cuts_vfr.mp4", (4, b), (4, c), timing="irregular", video=ticks),
        film("fades.mp4", (4, a), (4, b), (4, c), joins=("fade", "fade")),
        film("fade_and_cut.mp4", (3.6, c), (4.4, a), (4, b), joins=("fade", "cut")),
        film("pan_no_cut.mp4", (8, past), events=False, notes="the camera turns past a person"),
        film("pan_fast_no_cut.mp4", (6, Appearance("", "office", pan_speed=0.3)), events=False, voice=""),
    ]


def _film(name: str, *groups: str, seconds: float = 7.5, place: str = "office", **more: Any) -> Film:
    """A small film of one shot, with events."""
    look = Appearance("upper body", place, hue=40 * (len(name) % 9))
    return Film(name, groups, ((seconds, look),), **({"width": 320, "height": 180, "events": True} | more))


def _timing() -> list[Film]:
    """Films with unusual timing, containers, codecs, sizes and sound formats."""
    ticks = Fraction(1, 90_000)
    reordered = VideoFormat(b_frames=3, options={"preset": "veryfast"})
    rates = {"23976": 24 * NTSC, "2997": 30 * NTSC} | {str(n): Fraction(n) for n in (24, 25, 30, 50, 60)}
    films = [_film(f"fps_{name}.mp4", video=VideoFormat(rate=rate)) for name, rate in rates.items()]
    films += [
        _film("vfr_irregular.mp4", timing="irregular", video=VideoFormat(time_base=ticks)),
        _film("vfr_drops.mp4", timing="drops", video=VideoFormat(rate=Fraction(30), time_base=ticks)),
        _film("b_frames.mp4", video=reordered),
        _film("edit_list.mp4", hidden=13, video=reordered,
              notes="an edit list hides 0.52 s of pictures, up to the middle of a group"),
        _film("edit_list_both.mp4", hidden=13, hidden_sound=True, audio_from=Fraction(-13, 25),
              notes="an edit list hides 0.52 s of pictures and sound"),
        _film("fragmented.mp4", video=reordered, container_options={"movflags": "+frag_keyframe+delay_moov"}),
        _film("rotate_90.mp4", video=VideoFormat(rotation=90), notes="stored lying, shown standing"),
        _film("rotate_180.mp4", video=VideoFormat(rotation=180), notes="stored upside down"),
        _film("rotate_270.mov", video=VideoFormat(rotation=-90), container="mov", notes="stored lying, shown standing"),
        _film("start_10s.mkv", start=Fraction(10), container="matroska", notes="both streams start at 10 s"),
        _film("start_5s.mp4", start=Fraction(5), notes="both streams start at 5 s"),
        _film("start_14h.ts", start=Fraction(50_000), container="mpegts", video=reordered,
              notes="MPEG-TS with B-frames whose clock starts at 50,000 s"),
        _film("wrap.ts", start=Fraction(95_439), container="mpegts", video=reordered,
              notes="the 33-bit clock wraps in the middle"),
        _film("audio_late.mp4", audio_from=Fraction(77, 100), notes="sound starts 0.77 s after the picture"),
        _film("audio_late.mkv", audio_from=Fraction(77, 100), container="matroska"),
        _film("video_late.mp4", video_from=Fraction(16, 25), notes="the picture starts 0.64 s after the sound"),
        _film("video_late.mkv", video_from=Fraction(16, 25), container="matroska"),
        _film("audio_short.mp4", audio_to=Fraction(9, 2), notes="sound ends 3 s before the picture"),
        _film("audio_long.mp4", audio_to=Fraction(9), notes="sound ends 1.5 s after the picture"),
        _film("anamorphic.mp4", width=240, video=VideoFormat(sample_aspect_ratio=Fraction(4, 3)),
              notes="pixels are wider than high"),
        _film("interlaced.mp4", video=VideoFormat(interlaced=True), notes="50 fields a second, upper first"),
        _film("interlaced.ts", container="mpegts", start=Fraction(1), audio=MP2,
              video=VideoFormat("mpeg2video", interlaced=True, gop=12, b_frames=2), notes="as broadcast"),
        _film("odd_size.mp4", width=321, height=241, video=VideoFormat(pix_fmt="yuv444p")),
        _film("odd_size.avi", width=321, height=241, container="avi", video=VideoFormat("mpeg4"),
              audio=AudioFormat("pcm_s16le", sample_format="s16")),
        _film("portrait.mp4", width=180, height=320),
        _film("hevc_10bit.mp4", video=VideoFormat("libx265", "yuv420p10le")),
        _film("vp9_opus.webm", container="webm", video=VideoFormat("libvpx-vp9"), audio=OPUS),
        _film("av1_opus.mkv", container="matroska", video=VideoFormat("libsvtav1"), audio=OPUS),
        _film("mpeg4_mp3.avi", container="avi", video=VideoFormat("mpeg4"), audio=MP3),
        _film("full_range.mp4", video=VideoFormat(pix_fmt="yuvj420p", full_range=True)),
        _film("mono_8k.mp4", audio=AudioFormat(rate=8000, bit_rate=24_000)),
        _film("mono_22k.mkv", container="matroska", audio=AudioFormat("flac", 22_050, "mono", "s16")),
        _film("stereo_44k.mp4", audio=AudioFormat(rate=44_100, layout="stereo")),
        _film("surround.mp4", audio=AudioFormat(layout="5.1", bit_rate=192_000)),
        _film("surround_ac3.mkv", container="matroska", audio=AudioFormat("ac3", layout="5.1", bit_rate=384_000)),
    ]  # fmt: skip
    return [replace(film, groups=("timing",)) for film in films]


def _broken() -> list[File]:
    """Broken files, copies, and files with difficult names."""
    group = ("broken",)
    seconds = VideoFormat(gop=25)
    short = partial(_film, "", seconds=6.0)
    return [
        _film("no_audio.mp4", *group, audio=None, voice="", notes="no sound stream"),
        Changed("audio_only.mp4", group, short(), without_pictures),
        Changed("truncated.mp4", group, short(), partial(cut_off, share=0.6),
                "the index at the end is missing"),
        Changed("truncated_index_first.mp4", group, short(container_options={"movflags": "+faststart"}),
                partial(cut_off, share=0.6), "the index is whole, the data end early"),
        Changed("truncated.mkv", group, short(seconds=9.0, container="matroska"), partial(cut_off, share=0.7)),
        Bytes("empty.mp4", group, b"", "empty"),
        Bytes("text.mp4", group, b"Dear editor,\n\nplease find the footage enclosed.\n" * 40, "not media"),
        Bytes("noise.mp4", group, np.random.default_rng(2).bytes(60_000), "not media"),
        Changed("corrupt_frames.mp4", group, short(video=seconds, seconds=14.0),
                partial(overwrite, spans=((6.4, 6.6),), whole=True), "the data of 5 frames are gone"),
        Changed("corrupt_slices.mp4", group, short(video=seconds, seconds=14.0),
                partial(overwrite, spans=((6.4, 6.6),), whole=False), "the data of 5 frames are damaged inside"),
        Changed("corrupt_most.mp4", group, short(video=seconds),
                partial(overwrite, spans=((0.4, 5.8),), whole=True, usable=False), "nearly all frames are gone"),
        Changed("talk_office again.mp4", group, _talk()[0], partial(copy_of, name="talk_office.mp4"),
                "the same bytes as another file"),
        *(_film(name, *group, seconds=6.0) for name in HOSTILE_NAMES),
    ]  # fmt: skip


HOSTILE_NAMES = (
    "name with  spaces.mp4",
    'she said "it\'s" $HOME; rm *.mp4',
    "two\nlines.mp4",
    "-dash, comma%20and#hash.mp4",
    "Grüße 日本語 ✓.mp4",
)


DEMO = (  # the group "demo": the footage of `make demo`
    "blur_a.mp4",
    "clean_a.mp4",
    "clean_medium_a.mp4",
    "copy_small_a.mp4",
    "cuts_plain.mp4",
    "fades.mp4",
    "frozen.mp4",
    "late_0.4_a.mp4",
    "nobody.mp4",
    "shake.mp4",
    "subtitles_a.mp4",
    "talk_medium.mp4",
    "talk_office again.mp4",
    "talk_office.mp4",
    "truncated.mp4",
    "two_people_a.mp4",
    "vfr_irregular.mp4",
    "watermark_a.mp4",
)


def files() -> dict[str, File]:
    """All files by name."""
    everything: list[File] = [*_talk(), *_cuts(), *_timing(), *_broken(), *faults()]
    for k, file in enumerate(everything):
        if file.name in DEMO:
            everything[k] = replace(file, groups=(*file.groups, "demo"))
    return {file.name: file for file in everything}
