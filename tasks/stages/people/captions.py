"""What a caption says about framing, place and people.

Only phrases that leave no doubt count. A caption that is not in English, or that contradicts itself, gives nothing.
Framing is named as in active-mind, appendix B: upper body (from the chest up), medium (from the hips up), full, long.
"""

import re
import unicodedata


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


def _pattern(*phrases: str) -> re.Pattern[str]:
    """A pattern of any of the phrases as whole words. The longest phrase that fits at a place matches."""
    longest_first = sorted(phrases, key=lambda p: (-len(p), p))
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")


def _up_from(*parts: str) -> tuple[str, ...]:
    """Phrases for a frame that begins at a part of the body. "knees up" alone is not one: it may be a posture."""
    return tuple(
        form.format(part)
        for part in parts
        for form in ("from the {} up", "from {} up", "{} up shot", "{} up view", "{} up framing", "{} up portrait")
    )


# The terms of cinematography for each framing. The longest phrase matches, so "medium closeup" is never read as
# "closeup", nor "medium long shot" as "long shot".
_FRAMING = {
    "upper body": _phrases(
        "closeup, extreme closeup, tight closeup, medium closeup, head and shoulders, head and shoulder, head shot, "
        "headshot, talking head, bust shot, chest shot, upper body, upper torso"
    )
    + _up_from("chest", "bust", "shoulders"),
    "medium": _phrases(
        "medium shot, mid shot, midshot, medium view, medium framing, waist shot, half body, half length, cowboy shot, "
        "american shot, three quarter shot, three quarter length, medium full shot, medium long shot, medium wide shot"
    )
    + _up_from("waist", "hips", "hip", "thighs", "knees"),
    "full": _phrases(
        "full body, full shot, full length, full figure, visible from head to toe, shown from head to toe, "
        "seen from head to toe, framed from head to toe"
    ),
    "long": _phrases(
        "long shot, extreme long shot, very long shot, wide shot, extreme wide shot, very wide shot, wide angle shot, "
        "distant shot, far shot, establishing shot"
    ),
}
_FRAMING_OF = {phrase: framing for framing, phrases in _FRAMING.items() for phrase in phrases}

_NOUNS = _phrases(
    "person, boy, girl, kid, toddler, adult, guy, human, presenter, host, hostess, newscaster, reporter, journalist, "
    "actor, actress, singer, dancer, teacher, professor, lecturer, student, speaker, interviewer, interviewee, "
    "politician, president, minister, doctor, nurse, patient, musician, performer, player, athlete, coach, soldier, "
    "officer, worker, chef, judge, lawyer, scientist, astronaut, customer, passenger, pedestrian, mother, father, "
    "daughter, son, brother, sister, friend, bride, groom, vlogger, streamer, narrator, newsreader, crowd"
)
_PEOPLE = (
    _NOUNS
    + tuple(f"{noun}s" for noun in _NOUNS)
    + _phrases(
        "people, man, men, woman, women, child, children, lady, ladies, gentleman, gentlemen, policeman, policewoman, "
        "family, somebody, someone, he, she, him, her, selfie"
    )
)
_PEOPLE_OR_FACES = {"face", "faces", "head", "portrait", *_PEOPLE}
_PARTS = set(
    _phrases(
        "hand, hands, finger, fingers, foot, feet, eye, eyes, lip, lips, ear, ears, arm, arms, leg, legs, shoe, shoes"
    )
)

_PEOPLE_PATTERN = _pattern(*_PEOPLE)
_FRAMING_PATTERN = _pattern(*_FRAMING_OF)
_PLACES = {
    "indoor": _pattern(
        *_phrases(
            "indoor, indoors, office, studio, kitchen, bedroom, bathroom, classroom, corridor, hallway, auditorium, "
            "library, gym, restaurant, living room, conference room, meeting room, in a room, in the room, inside a "
            "room, lounge, laboratory, courtroom, hospital, supermarket, newsroom"
        )
    ),
    "outdoor": _pattern(
        *_phrases(
            "outdoor, outdoors, outside, street, beach, forest, meadow, mountain, mountains, desert, garden, "
            "seaside, lawn, riverbank, playground, vineyard, in a park, in the park, on a field, in a field, city "
            "square, open air, by the sea"
        )
    ),
}
# Words that nearly every caption in English has, and that other languages do not have.
_ENGLISH = _pattern("the", "with", "and", "are")
# What people do, and their titles: "Obama speaks". A parrot may speak too, so a caption with one of these is doubtful.
_DOING = _pattern(
    *_phrases(
        "speak, speaks, speaking, talk, talks, talking, say, says, saying, sing, sings, singing, smile, smiles, "
        "smiling, laugh, laughs, laughing, explain, explains, explaining, interview, interviews, interviewed, speech, "
        "address, addresses, addressing, announces, discusses, gestures, gesturing, nods, nodding, mr, mrs, ms, dr"
    )
)
_BEFORE_PLACES = {"in", "at", "near", "from", "on", "over", "across", "around", "through", "towards"}
# A place on a screen, in a painting or through a window is not the place of the scene.
_SEEN_ELSEWHERE = _pattern(
    *_phrases("window, windows, poster, painting, photo, photograph, screen, backdrop, mural, virtual background")
)
_NEGATED = re.compile(r"\b(?:no|not|never|without|isn't|neither|nor|rather than|instead of)(?: \w+){0,2} $")
# The phrase is about a body or a thing, not the framing: "moves her upper body", "a full-length dress".
_OWNED = re.compile(r"\b(?:his|her|their|its|my|your|s|by a) $")
_THING = re.compile(
    r"^ (?:workout|exercises?|strength|training|muscles?|movements?|motion|scan|armou?r|dress|gown|coat|skirt|hair|"
    r"mirror|film|movie|feature)\b"
)
# "close up" without a hyphen is a verb unless the words beside it say otherwise.
_CLOSE_UP = re.compile(
    r"\bclose-up\b|(?:(?<=\ba )|(?<=\bin )|(?<=\bmedium )|(?<=\bextreme )|(?<=\btight ))close up\b|"
    r"\bclose up(?= (?:shot|view|portrait|framing)\b)"
)
_DASHES = re.compile(r"[-_/]")


def framing_in(caption: str) -> str:
    """The framing that a caption names: "upper body", "medium", "full", "long"; "" for none, or more than one."""
    text = _plain(caption)
    named = {
        _FRAMING_OF[match.group()]
        for match in _FRAMING_PATTERN.finditer(text)
        if not _NEGATED.search(_before(match))
        and not _OWNED.search(_before(match))
        and not _THING.search(_after(match))
        and _shows_a_person(_after(match))
    }
    return named.pop() if len(named) == 1 else ""


def scene_in(caption: str) -> str:
    """The place that a caption names: "indoor", "outdoor"; "" for none, or both."""
    text = _plain(caption)
    if _SEEN_ELSEWHERE.search(text):
        return ""
    places = [place for place, pattern in _PLACES.items() if _says(pattern, text)]
    return places[0] if len(places) == 1 else ""


def names_a_person(caption: str) -> bool | None:
    """Whether a caption speaks of a person.

    None where that is doubtful: the caption is empty or not clearly English, or it has no word for a person but a
    possible name, or an action of people.
    """
    text = _plain(caption)
    if _says(_PEOPLE_PATTERN, text):
        return True
    if _says(_DOING, text) or _has_a_name(caption):
        return None
    return False if _ENGLISH.search(text) else None


def _has_a_name(caption: str) -> bool:
    """Whether a word inside a sentence has a capital, as names have. Names of places do not count: "in New York"."""
    before, of_place = ".", False
    for word in unicodedata.normalize("NFKC", caption).split():
        capital = word.lstrip("\"'(\u201c\u2018")[:1].isupper() and word != "I"
        of_place = capital and (of_place or before.casefold() in _BEFORE_PLACES)
        if capital and not of_place and before[-1] not in ".!?:;":
            return True
        before = word
    return False


def _says(pattern: re.Pattern[str], text: str) -> bool:
    """Whether the pattern is in `text` without a negation before it."""
    return any(not _NEGATED.search(_before(match)) for match in pattern.finditer(text))


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - 80) : match.start()]


def _after(match: re.Match[str]) -> str:
    return match.string[match.end() : match.end() + 80]


def _plain(caption: str) -> str:
    """The caption in lower case, with dashes as spaces and one space between words."""
    text = unicodedata.normalize("NFKC", caption).casefold().replace("\u2019", "'")
    text = _CLOSE_UP.sub("closeup", re.sub(r"[\u2010-\u2015]", "-", " ".join(text.split())))
    return " ".join(_DASHES.sub(" ", text).split())


def _shows_a_person(after: str) -> bool:
    """Whether a framing phrase that goes on with "of ..." is of a person, not of a cup or a pair of hands.

    True where the text does not go on with "of".
    """
    of = re.match(r"(?: (?:shot|view|portrait|framing))? of ((?:[\w']+ ?){1,6})", after)
    if of is None:
        return True
    words = [word.removesuffix("'s") for word in of.group(1).split()]
    return any(word in _PEOPLE_OR_FACES for word in words) and not any(word in _PARTS for word in words)
