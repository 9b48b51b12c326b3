"""What the templates say: measured signals in, sentences and phrases out, and nothing that was not measured.

Bounds between "little" and "much" were chosen on 7 to 9 real talkers and 5 synthetic voices, so that most of the real
ones lie in the middle; those of picture and camera are round numbers. How a voice makes one feel is told in three words
only, from pitch, loudness and pace; what a face feels, and what somebody wants, is not told.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tasks.guidance_schema import Origin, Phrases, Tone
from tasks.prosody import Voice

_CAPTION_CHARS = 2000  # that are looked at

# from .. to of what is neither little nor much
_PITCH_RANGE = (6.0, 11.0)  # semitones
_DYNAMICS = (10.0, 16.0)  # dB
_PACE = (2.8, 3.9)  # syllables a second, as tasks.prosody counts them
_PITCH = (140.0, 190.0)  # Hz
_LOUDNESS = (-32.0, -16.0)  # dBFS
_SPOKEN = (0.7, 0.93)  # share of the time
_MOUTH = (0.015, 0.06)  # standard deviation of the inner-lip opening, as identity scales it
_HEAD = (0.06, 0.2)  # face heights a second
_BODY = (0.01, 0.06)  # short sides a second
_DRIFT, _GROWTH = 0.4, 0.12  # face heights; share of the face's height
_TURNED, _TILTED = 20.0, 12.0  # degrees
_LIGHT, _COLOUR = (70.0, 170.0), (15.0, 60.0)  # mean luma, 0 to 255; Hasler and Suesstrunk's M3
_CAMERA = (0.02, 0.1)  # short sides a second; a head that fills the frame may pass for a camera in between
_HANDS = (0.1, 0.6)  # share of the frames


@dataclass(frozen=True)
class Segment:
    """A part of the clip between pauses.

    start_s, end_s: from the clip's start. spoken: share of the time with speech. louder_db, higher: loudness, and pitch
    in semitones, against the whole clip's voice; None without voice. mouth: standard deviation of the inner-lip
    opening, in the unit of identity's array `lips`. head_speed: of the face, face heights a second. right, down: how
    far the face has come, in faces. nearer: how much taller it has become, as a share. The last five are None where no
    face was followed.
    """

    start_s: float
    end_s: float
    spoken: float = 0.0
    louder_db: float | None = None
    higher: float | None = None
    mouth: float | None = None
    head_speed: float | None = None
    right: float | None = None
    down: float | None = None
    nearer: float | None = None


@dataclass(frozen=True)
class Signals:
    """What is known of a clip; None, "" or () where it was not measured.

    width, height: pixels. caption, language, transcript: the source's, as they came. loudness_db: of all sound, None
    without sound. voice: None without one. The others are columns of the stages people, motion, identity, aesthetics
    and pose under their own names; hands: share of the frames with a hand. framing_by, light_by: the stages
    whose picture framing, and brightness and colourfulness, are of. camera_speed, subject_speed: of the whole picture,
    in its short sides a second, also where it was cut later.
    """

    width: int
    height: int
    segments: tuple[Segment, ...]
    caption: str = ""
    language: str = ""
    transcript: str = ""
    loudness_db: float | None = None
    spoken: float = 0.0
    voice: Voice | None = None
    person_share: float | None = None
    framing: str = ""
    framing_by: Origin = "people"
    scene: str = ""
    faces: int | None = None
    yaw: float | None = None
    roll: float | None = None
    camera_speed: float | None = None
    subject_speed: float | None = None
    brightness: float | None = None
    colourfulness: float | None = None
    light_by: Origin = "aesthetics"
    hands: float | None = None


@dataclass(frozen=True)
class Said:
    """Words, and what they came from; None for the clip's own size and length."""

    words: str
    origin: Origin | None


def tone_of(voice: Voice | None) -> Tone:
    """In one word: lively where two of pitch range, dynamics and pace are wide and none is narrow, calm the other way
    round; "" without a voice."""
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
    """How the voice sounds, and why it is said to; "" without one."""
    if voice is None:
        return ""
    return (
        f"The voice sounds {tone_of(voice)}: its pitch spans {voice.pitch_range:.0f} semitones, its loudness "
        f"{voice.dynamics_db:.0f} dB, at {voice.rate_hz:.1f} syllables a second."
    )


def division_of(segments: int) -> str:
    """How the sound was divided."""
    pauses = segments - 1
    return f"Divided at {pauses} pause{'s'[: pauses != 1]} of speech." if pauses else "Not divided."


def content_of(segment: Segment) -> str:
    """What is heard in a segment, without its words."""
    if not segment.spoken:
        return "No speech."
    parts = [f"Speech for {segment.spoken:.0%} of the time"]
    if segment.louder_db is not None and abs(segment.louder_db) >= 2:
        parts.append("louder than the rest" if segment.louder_db > 0 else "quieter than the rest")
    if segment.higher is not None and abs(segment.higher) >= 1.5:
        parts.append("at a higher pitch" if segment.higher > 0 else "at a lower pitch")
    return ", ".join(parts) + "."


def expression_of(segment: Segment) -> str:
    """What the face does in a segment, as far as it was followed."""
    if segment.mouth is None:
        return "No face is followed."
    speaks = "during speech" if segment.spoken >= 0.5 else "with little speech" if segment.spoken else "without speech"
    return f"The mouth {('hardly moves', 'moves', 'opens wide')[_level(segment.mouth, _MOUTH) + 1]} {speaks}."


def action_of(segment: Segment) -> str:
    """What the head does in a segment, as far as it was followed."""
    if segment.head_speed is None:
        return "No movement of the head is known."
    moves = ("is nearly still", "moves gently", "moves a lot")[_level(segment.head_speed, _HEAD) + 1]
    ways = _ways([segment])
    return f"The head {moves}{', '.join(['', *(f'and it {way}' for way in ways)])}."


def phrases_of(signals: Signals) -> tuple[Phrases, dict[str, tuple[Origin, ...]]]:
    """physavatar's phrases, of five words at most each, and where those of each part came from."""
    said = {"audio": _audio(signals), "image": _image(signals), "video": _video(signals)}
    chosen = {part: list(each)[:5] for part, each in said.items()}
    origins = {part: tuple(sorted({s.origin for s in each if s.origin})) for part, each in chosen.items()}
    return Phrases(**{part: tuple(s.words for s in each) for part, each in chosen.items()}), origins


def _audio(signals: Signals) -> Iterable[Said]:
    if signals.loudness_db is None:
        return [Said(words, None) for words in ("no sound", "no voice", "no rhythm")]
    volume = Said(("low volume", "moderate volume", "high volume")[_level(signals.loudness_db, _LOUDNESS) + 1], "sound")
    voice = signals.voice
    if voice is None:
        heard = "few words" if signals.spoken else "no speech"
        return [Said(heard, "sound"), Said("no steady voice", "sound"), volume]
    pauses = ("long pauses", "short pauses", "hardly any pauses")[_level(signals.spoken, _SPOKEN) + 1]
    height = ("low", "medium", "high")[_level(voice.pitch_hz, _PITCH) + 1]
    span = ("narrow", "moderate", "wide")[_level(voice.pitch_range, _PITCH_RANGE) + 1]
    pace = ("slow", "steady", "quick")[_level(voice.rate_hz, _PACE) + 1]
    swing = ("even", "varied", "strongly varied")[_level(voice.dynamics_db, _DYNAMICS) + 1]
    return [
        Said(f"{tone_of(voice)} vocal tone", "sound"),
        Said(f"{pace} pace", "sound"),
        Said(pauses, "sound"),
        Said(f"{height} pitch, {span} intonation", "sound"),
        Said(f"{volume.words}, {swing}", "sound"),
    ]


def _image(signals: Signals) -> Iterable[Said]:
    who, outfit = person_in(signals.caption), outfit_in(signals.caption)
    if signals.person_share == 0:
        yield Said("nobody in view", "people")
    else:
        if signals.framing:
            shot = f"{signals.framing} shot" if signals.framing != "full" else "full body shot"
            yield Said(f"{who or 'person'}, {shot}", signals.framing_by)
        elif who:
            yield Said(who, "caption")
        if outfit:
            yield Said(f"wearing {outfit}", "caption")
        if signals.yaw is not None and signals.roll is not None:
            turned, tilted = abs(signals.yaw) > _TURNED, abs(signals.roll) > _TILTED
            yield Said("face turned aside" if turned else "tilted head" if tilted else "facing camera", "identity")
    if signals.scene:
        yield Said(f"{signals.scene} setting", "people")
    if signals.faces is not None and signals.faces > 1:
        yield Said("other faces in view", "identity")
    if signals.brightness is not None:
        yield Said(
            ("dim light", "even light", "bright light")[_level(signals.brightness, _LIGHT) + 1], signals.light_by
        )
    if signals.colourfulness is not None:
        colour = ("muted", "natural", "vivid")[_level(signals.colourfulness, _COLOUR) + 1]
        yield Said(f"{colour} colours", signals.light_by)
    # there are always three
    shape = "square" if signals.width == signals.height else "wide" if signals.width > signals.height else "upright"
    yield Said(f"{shape} picture", None)
    yield Said(f"{signals.width} pixels wide", None)
    yield Said(f"{signals.height} pixels high", None)


def _video(signals: Signals) -> Iterable[Said]:
    seen = [s for s in signals.segments if s.mouth is not None and s.head_speed is not None]
    if seen:
        whole = sum(s.end_s - s.start_s for s in seen)
        mouth = sum((s.mouth or 0.0) * (s.end_s - s.start_s) for s in seen) / whole
        head = sum((s.head_speed or 0.0) * (s.end_s - s.start_s) for s in seen) / whole
        lips = ("mouth nearly still", "mouth moves", "mouth opens wide")[_level(mouth, _MOUTH) + 1]
        yield Said(f"{lips} during speech" if signals.spoken >= 0.5 else lips, "identity")
        yield Said(
            ("head nearly still", "gentle head movement", "lively head movement")[_level(head, _HEAD) + 1], "identity"
        )
        ways = _ways(seen)
        if ways:
            yield Said(f"head {ways[0]}", "identity")
    if signals.voice is not None:
        yield Said(f"{tone_of(signals.voice)} delivery", "sound")
    if signals.subject_speed is not None:
        body = ("little", "moderate", "much")[_level(signals.subject_speed, _BODY) + 1]
        yield Said(f"{body} body movement" if signals.person_share else f"{body} movement", "motion")
    if signals.hands is not None:
        yield Said(("hands out of view", "hands at times", "hands in view")[_level(signals.hands, _HANDS) + 1], "pose")
    if signals.camera_speed is not None and _level(signals.camera_speed, _CAMERA):
        yield Said("moving camera" if signals.camera_speed > _CAMERA[1] else "steady camera", "motion")
    # there are always three
    if not seen:
        yield Said("no face followed", None)
    yield Said("one continuous shot", None)
    yield Said(f"{signals.segments[-1].end_s:.0f} seconds long", None)


def _ways(segments: list[Segment]) -> list[str]:
    """Where the head has gone over some segments: at most the strongest two of what it did."""
    right, down, nearer = (sum(getattr(s, n) or 0.0 for s in segments) for n in ("right", "down", "nearer"))
    moves = [
        (abs(right) / _DRIFT, "goes right" if right > 0 else "goes left"),
        (abs(down) / _DRIFT, "goes down" if down > 0 else "goes up"),
        (abs(nearer) / _GROWTH, "comes nearer" if nearer > 0 else "draws back"),
    ]
    return [words for strength, words in sorted(moves, reverse=True) if strength >= 1][:2]


def _level(value: float, middle: tuple[float, float]) -> int:
    """-1 below the middle, 0 in it, 1 above it."""
    return int(value > middle[1]) - int(value < middle[0])


# Words that may be taken from a caption: no other word of it is ever repeated.
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
    """ "woman" or "man", where a caption speaks of one kind only; "" otherwise."""
    found = set(_PERSON_WORD.findall(_plain(caption)))
    kinds = [kind for kind, words in _PERSON.items() if found & set(words)]
    return kinds[0] if len(kinds) == 1 else ""


def outfit_in(caption: str) -> str:
    """The first two pieces of clothing that a caption names, each with its colour; "" without any."""
    text = _plain(caption)
    pieces: dict[str, str] = {}
    for match in _OUTFIT.finditer(text):
        if not _DENIED.search(text[max(0, match.start() - 40) : match.start()]):
            pieces.setdefault(match["piece"], match.group())
    return ", ".join(list(pieces.values())[:2])


def _plain(caption: str) -> str:
    return " ".join(re.findall(r"\w+", caption[:_CAPTION_CHARS].casefold()))
