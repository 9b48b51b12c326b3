"""What a caption says of framing, place and people: a few sure phrases, and nothing where they leave doubt.

Framing in the words of active-mind, appendix B: upper body (from the chest up), medium (from the hips up), full, long.
Captions in another language than English, or that contradict themselves, say nothing.
"""

import re
import unicodedata


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


def _pattern(*phrases: str) -> re.Pattern[str]:
    """Any of the phrases as whole words, the longest that fits at each place."""
    longest_first = sorted(phrases, key=lambda p: (-len(p), p))
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")


def _up_from(*parts: str) -> tuple[str, ...]:
    """The ways of saying that a picture begins at a part of the body; "knees up" alone may be a posture."""
    return tuple(
        form.format(part)
        for part in parts
        for form in ("from the {} up", "from {} up", "{} up shot", "{} up view", "{} up framing", "{} up portrait")
    )


# The names that cinematography has for each class. The longest phrase counts, so that "medium closeup" is never taken
# for "closeup", nor "medium long shot" for "long shot".
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
# words that hardly a caption in English lacks, and that other languages do not have
_ENGLISH = _pattern("the", "with", "and", "are")
# What people do, and what they are called by: "Obama speaks". A parrot may speak as well, so this is a doubt.
_DOING = _pattern(
    *_phrases(
        "speak, speaks, speaking, talk, talks, talking, say, says, saying, sing, sings, singing, smile, smiles, "
        "smiling, laugh, laughs, laughing, explain, explains, explaining, interview, interviews, interviewed, speech, "
        "address, addresses, addressing, announces, discusses, gestures, gesturing, nods, nodding, mr, mrs, ms, dr"
    )
)
_BEFORE_PLACES = {"in", "at", "near", "from", "on", "over", "across", "around", "through", "towards"}
# On a screen, in a picture or through a window a place is seen, not been in.
_SEEN_ELSEWHERE = _pattern(
    *_phrases("window, windows, poster, painting, photo, photograph, screen, backdrop, mural, virtual background")
)
_NEGATED = re.compile(r"\b(?:no|not|never|without|isn't|neither|nor|rather than|instead of)(?: \w+){0,2} $")
# the body or a thing is spoken of, not the framing: "moves her upper body", "a full-length dress", "by a long shot"
_OWNED = re.compile(r"\b(?:his|her|their|its|my|your|s|by a) $")
_THING = re.compile(
    r"^ (?:workout|exercises?|strength|training|muscles?|movements?|motion|scan|armou?r|dress|gown|coat|skirt|hair|"
    r"mirror|film|movie|feature)\b"
)
# "close up" without its hyphen is a verb unless something beside it says otherwise
_CLOSE_UP = re.compile(
    r"\bclose-up\b|(?:(?<=\ba )|(?<=\bin )|(?<=\bmedium )|(?<=\bextreme )|(?<=\btight ))close up\b|"
    r"\bclose up(?= (?:shot|view|portrait|framing)\b)"
)
_DASHES = re.compile(r"[-_/]")


def framing_in(caption: str) -> str:
    """The framing that a caption names: "upper body", "medium", "full", "long"; "" when none, or more than one."""
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
    """The place that a caption names: "indoor", "outdoor"; "" when none, or both."""
    text = _plain(caption)
    if _SEEN_ELSEWHERE.search(text):
        return ""
    places = [place for place, pattern in _PLACES.items() if _says(pattern, text)]
    return places[0] if len(places) == 1 else ""


def names_a_person(caption: str) -> bool | None:
    """Whether a caption speaks of anybody; None where it leaves doubt: empty, not plainly English, or with what may be
    somebody's name or somebody's doing and no word for a person."""
    text = _plain(caption)
    if _says(_PEOPLE_PATTERN, text):
        return True
    if _says(_DOING, text) or _has_a_name(caption):
        return None
    return False if _ENGLISH.search(text) else None


def _has_a_name(caption: str) -> bool:
    """Whether a word inside a sentence has a capital, as names have; not those of places: "in New York"."""
    before, of_place = ".", False
    for word in unicodedata.normalize("NFKC", caption).split():
        capital = word.lstrip("\"'(\u201c\u2018")[:1].isupper() and word != "I"
        of_place = capital and (of_place or before.casefold() in _BEFORE_PLACES)
        if capital and not of_place and before[-1] not in ".!?:;":
            return True
        before = word
    return False


def _says(pattern: re.Pattern[str], text: str) -> bool:
    """Whether `text` has the pattern without a denial before it."""
    return any(not _NEGATED.search(_before(match)) for match in pattern.finditer(text))


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - 80) : match.start()]


def _after(match: re.Match[str]) -> str:
    return match.string[match.end() : match.end() + 80]


def _plain(caption: str) -> str:
    """Lower case, dashes as spaces, one space between words."""
    text = unicodedata.normalize("NFKC", caption).casefold().replace("\u2019", "'")
    text = _CLOSE_UP.sub("closeup", re.sub(r"[\u2010-\u2015]", "-", " ".join(text.split())))
    return " ".join(_DASHES.sub(" ", text).split())


def _shows_a_person(after: str) -> bool:
    """Whether what a framing phrase is "of" is somebody: not a cup, not a pair of hands; true when it does not say."""
    of = re.match(r"(?: (?:shot|view|portrait|framing))? of ((?:[\w']+ ?){1,6})", after)
    if of is None:
        return True
    words = [word.removesuffix("'s") for word in of.group(1).split()]
    return any(word in _PEOPLE_OR_FACES for word in words) and not any(word in _PARTS for word in words)
