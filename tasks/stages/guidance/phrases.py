"""The templates: sentences and phrases from measured signals. They say nothing that was not measured.

The bounds between "little" and "much" were chosen on 7 to 9 real talkers and 5 synthetic voices, so that most real
talkers lie between them. The bounds for image and camera are round numbers. The emotion of a voice is one of three
words, from pitch, loudness and speaking rate. The emotion of a face and a speaker's intention are not stated.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tasks.stages.guidance.prosody import Voice
from tasks.stages.guidance.schema import Origin, Phrases, Tone
from tasks.stages.guidance.signals import SegmentSignals, Signals

_CAPTION_CHARS = 2000  # of a caption that are read

# The range of each signal that is neither little nor much.
_PITCH_RANGE = (6.0, 11.0)  # semitones
_DYNAMICS = (10.0, 16.0)  # dB
_PACE = (2.8, 3.9)  # syllables a second of speech (tasks.stages.guidance.prosody)
_PITCH = (140.0, 190.0)  # Hz
_LOUDNESS = (-32.0, -16.0)  # dBFS
_SPOKEN = (0.7, 0.93)  # share of the time
_MOUTH = (0.015, 0.06)  # standard deviation of the inner-lip opening, in the unit of identity's array `lips`
_HEAD = (0.06, 0.2)  # face sizes a second
_BODY = (0.01, 0.06)  # short sides a second
_DRIFT, _GROWTH = 0.4, 0.12  # least move of the head in face sizes; least growth as a share of the face's height
_TURNED, _TILTED = 20.0, 12.0  # degrees
_LIGHT, _COLOUR = (70.0, 170.0), (15.0, 60.0)  # mean luma, 0 to 255; Hasler and Suesstrunk's M3
_CAMERA = (0.02, 0.1)  # short sides a second; between them, the motion may be that of a head that fills the frame
_HANDS = (0.1, 0.6)  # share of the frames


@dataclass(frozen=True)
class SourcedWords:
    """A phrase and where it came from.

    origin: None for a phrase that no measurement is behind, such as one on the clip's size.
    """

    words: str
    origin: Origin | None


def tone_of(voice: Voice | None) -> Tone:
    """How a voice sounds, in one word; "" without a voice.

    It is "lively" where at least two of pitch range, dynamics and speaking rate are high and none is low. It is "calm"
    where at least two are low and none is high. Else it is "neutral".
    """
    if voice is None:
        return ""
    levels = [
        _level(voice.pitch_range, _PITCH_RANGE),
        _level(voice.dynamics_db, _DYNAMICS),
        _level(voice.rate_hz, _PACE),
    ]
    if levels.count(1) >= 2 and -1 not in levels:
        return "lively"
    return "calm" if levels.count(-1) >= 2 and 1 not in levels else "neutral"


def emotion_of(voice: Voice | None) -> str:
    """A sentence on how the voice sounds, with the measurements behind it; "" without a voice."""
    if voice is None:
        return ""
    return (
        f"The voice sounds {tone_of(voice)}: its pitch spans {voice.pitch_range:.0f} semitones, its loudness "
        f"{voice.dynamics_db:.0f} dB, at {voice.rate_hz:.1f} syllables a second."
    )


def division_of(segments: int) -> str:
    """A sentence on how the audio was divided into segments."""
    pauses = segments - 1
    return f"Divided at {pauses} pause{'s'[: pauses != 1]} of speech." if pauses else "Not divided."


def content_of(segment: SegmentSignals) -> str:
    """A sentence on a segment's speech, without its words."""
    if not segment.spoken:
        return "No speech."
    parts = [f"Speech for {segment.spoken:.0%} of the time"]
    if segment.louder_db is not None and abs(segment.louder_db) >= 2:
        parts.append("louder than the rest" if segment.louder_db > 0 else "quieter than the rest")
    if segment.higher is not None and abs(segment.higher) >= 1.5:
        parts.append("at a higher pitch" if segment.higher > 0 else "at a lower pitch")
    return ", ".join(parts) + "."


def expression_of(segment: SegmentSignals) -> str:
    """A sentence on what the mouth does in a segment."""
    if segment.mouth is None:
        return "No face is followed."
    speaks = "during speech" if segment.spoken >= 0.5 else "with little speech" if segment.spoken else "without speech"
    return f"The mouth {('hardly moves', 'moves', 'opens wide')[_level(segment.mouth, _MOUTH) + 1]} {speaks}."


def action_of(segment: SegmentSignals) -> str:
    """A sentence on what the head does in a segment."""
    if segment.head_speed is None:
        return "No movement of the head is known."
    moves = ("is nearly still", "moves gently", "moves a lot")[_level(segment.head_speed, _HEAD) + 1]
    ways = _head_moves([segment])
    return f"The head {moves}{', '.join(['', *(f'and it {way}' for way in ways)])}."


def phrases_of(signals: Signals) -> tuple[Phrases, dict[str, tuple[Origin, ...]]]:
    """physavatar's phrases, each of at most five words; and the origins of each kind of phrases."""
    said = {"audio": _audio(signals), "image": _image(signals), "video": _video(signals)}
    chosen = {part: list(each)[:5] for part, each in said.items()}
    origins = {part: tuple(sorted({s.origin for s in each if s.origin})) for part, each in chosen.items()}
    return Phrases(**{part: tuple(s.words for s in each) for part, each in chosen.items()}), origins


def _audio(signals: Signals) -> Iterable[SourcedWords]:
    """At least three phrases on the voice."""
    if signals.loudness_db is None:
        return [SourcedWords(words, None) for words in ("no sound", "no voice", "no rhythm")]
    volume = SourcedWords(
        ("low volume", "moderate volume", "high volume")[_level(signals.loudness_db, _LOUDNESS) + 1], "sound"
    )
    voice = signals.voice
    if voice is None:
        speech = "few words" if signals.spoken else "no speech"
        return [SourcedWords(speech, "sound"), SourcedWords("no steady voice", "sound"), volume]
    pauses = ("long pauses", "short pauses", "hardly any pauses")[_level(signals.spoken, _SPOKEN) + 1]
    height = ("low", "medium", "high")[_level(voice.pitch_hz, _PITCH) + 1]
    span = ("narrow", "moderate", "wide")[_level(voice.pitch_range, _PITCH_RANGE) + 1]
    pace = ("slow", "steady", "quick")[_level(voice.rate_hz, _PACE) + 1]
    swing = ("even", "varied", "strongly varied")[_level(voice.dynamics_db, _DYNAMICS) + 1]
    return [
        SourcedWords(f"{tone_of(voice)} vocal tone", "sound"),
        SourcedWords(f"{pace} pace", "sound"),
        SourcedWords(pauses, "sound"),
        SourcedWords(f"{height} pitch, {span} intonation", "sound"),
        SourcedWords(f"{volume.words}, {swing}", "sound"),
    ]


def _image(signals: Signals) -> Iterable[SourcedWords]:
    """At least three phrases on the person and the setting."""
    person, outfit = person_in(signals.caption), outfit_in(signals.caption)
    if signals.person_share == 0:
        yield SourcedWords("nobody in view", "people")
    else:
        if signals.framing:
            shot = f"{signals.framing} shot" if signals.framing != "full" else "full body shot"
            yield SourcedWords(f"{person or 'person'}, {shot}", signals.framing_by)
        elif person:
            yield SourcedWords(person, "caption")
        if outfit:
            yield SourcedWords(f"wearing {outfit}", "caption")
        if signals.yaw is not None and signals.roll is not None:
            turned, tilted = abs(signals.yaw) > _TURNED, abs(signals.roll) > _TILTED
            yield SourcedWords(
                "face turned aside" if turned else "tilted head" if tilted else "facing camera", "identity"
            )
    if signals.scene:
        yield SourcedWords(f"{signals.scene} setting", "people")
    if signals.faces is not None and signals.faces > 1:
        yield SourcedWords("other faces in view", "identity")
    if signals.brightness is not None:
        yield SourcedWords(
            ("dim light", "even light", "bright light")[_level(signals.brightness, _LIGHT) + 1], signals.light_by
        )
    if signals.colourfulness is not None:
        colour = ("muted", "natural", "vivid")[_level(signals.colourfulness, _COLOUR) + 1]
        yield SourcedWords(f"{colour} colours", signals.light_by)
    # these three follow always, so that there are never fewer than three phrases
    shape = "square" if signals.width == signals.height else "wide" if signals.width > signals.height else "upright"
    yield SourcedWords(f"{shape} picture", None)
    yield SourcedWords(f"{signals.width} pixels wide", None)
    yield SourcedWords(f"{signals.height} pixels high", None)


def _video(signals: Signals) -> Iterable[SourcedWords]:
    """At least three phrases on movement and delivery."""
    seen = [s for s in signals.segments if s.mouth is not None and s.head_speed is not None]
    if seen:
        whole = sum(s.end_s - s.start_s for s in seen)
        mouth = sum((s.mouth or 0.0) * (s.end_s - s.start_s) for s in seen) / whole
        head = sum((s.head_speed or 0.0) * (s.end_s - s.start_s) for s in seen) / whole
        lips = ("mouth nearly still", "mouth moves", "mouth opens wide")[_level(mouth, _MOUTH) + 1]
        yield SourcedWords(f"{lips} during speech" if signals.spoken >= 0.5 else lips, "identity")
        yield SourcedWords(
            ("head nearly still", "gentle head movement", "lively head movement")[_level(head, _HEAD) + 1], "identity"
        )
        moves = _head_moves(seen)
        if moves:
            yield SourcedWords(f"head {moves[0]}", "identity")
    if signals.voice is not None:
        yield SourcedWords(f"{tone_of(signals.voice)} delivery", "sound")
    if signals.subject_speed is not None:
        body = ("little", "moderate", "much")[_level(signals.subject_speed, _BODY) + 1]
        yield SourcedWords(f"{body} body movement" if signals.person_share else f"{body} movement", "motion")
    if signals.hands is not None:
        yield SourcedWords(
            ("hands out of view", "hands at times", "hands in view")[_level(signals.hands, _HANDS) + 1], "pose"
        )
    if signals.camera_speed is not None and _level(signals.camera_speed, _CAMERA):
        yield SourcedWords("moving camera" if signals.camera_speed > _CAMERA[1] else "steady camera", "motion")
    # the last two follow always; with the two on a followed face, or the one on its absence, there are at least three
    if not seen:
        yield SourcedWords("no face followed", None)
    yield SourcedWords("one continuous shot", None)
    yield SourcedWords(f"{signals.segments[-1].end_s:.0f} seconds long", None)


def _head_moves(segments: list[SegmentSignals]) -> list[str]:
    """Where the head moved over some segments: at most its two strongest moves."""
    right, down, nearer = (sum(getattr(s, n) or 0.0 for s in segments) for n in ("right", "down", "nearer"))
    moves = [
        (abs(right) / _DRIFT, "goes right" if right > 0 else "goes left"),
        (abs(down) / _DRIFT, "goes down" if down > 0 else "goes up"),
        (abs(nearer) / _GROWTH, "comes nearer" if nearer > 0 else "draws back"),
    ]
    return [words for strength, words in sorted(moves, reverse=True) if strength >= 1][:2]


def _level(value: float, middle: tuple[float, float]) -> int:
    """-1 below the middle range, 0 in it, 1 above it."""
    return int(value > middle[1]) - int(value < middle[0])


# The words that may be taken from a caption. No other word of a caption is repeated.
_PERSON = {
    "woman": ("woman", "lady", "girl", "she"),
    "man": ("man", "gentleman", "guy", "boy", "he"),
}
_PERSON_WORD = re.compile(rf"\b(?:{'|'.join(w for words in _PERSON.values() for w in words)})\b")
_COLOURS = "black|white|grey|gray|red|blue|green|yellow|orange|purple|pink|brown|beige|navy|dark|light"
_CLOTHES = (
    "suit|blazer|jacket|coat|shirt|blouse|dress|sweater|hoodie|turtleneck|uniform|tie|scarf|hat|cap|glasses|sunglasses|"
    "headphones|headscarf|necklace"
)
_OUTFIT = re.compile(rf"\b(?:(?P<colour>{_COLOURS}) )?(?P<piece>{_CLOTHES})\b")
_DENIED = re.compile(r"\b(?:no|not|never|without)(?: \w+){0,2} $")


def person_in(caption: str) -> str:
    """ "woman" or "man" where the caption names one of them and not the other; else ""."""
    found = set(_PERSON_WORD.findall(_plain(caption)))
    kinds = [kind for kind, words in _PERSON.items() if found & set(words)]
    return kinds[0] if len(kinds) == 1 else ""


def outfit_in(caption: str) -> str:
    """The first two pieces of clothing that a caption names, each with its colour; "" where it names none."""
    text = _plain(caption)
    pieces: dict[str, str] = {}
    for match in _OUTFIT.finditer(text):
        if not _DENIED.search(text[max(0, match.start() - 40) : match.start()]):
            pieces.setdefault(match["piece"], match.group())
    return ", ".join(list(pieces.values())[:2])


def _plain(caption: str) -> str:
    return " ".join(re.findall(r"\w+", caption[:_CAPTION_CHARS].casefold()))
