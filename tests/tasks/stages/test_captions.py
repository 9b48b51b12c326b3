"""Captions: framing, place and people are read from clear captions, and nothing from doubtful ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.stages.people.captions import framing_in, names_a_person, scene_in
from tasks.stages.people.stage import FRAMINGS

SAID = [
    ("A close-up of a woman talking to the camera", "upper body"),
    ("Close-up shot of his face", "upper body"),
    ("a man in close up", "upper body"),
    ("A medium close\u2010up of a news presenter", "upper body"),
    ("Head-and-shoulders view of a politician", "upper body"),
    ("She is shown from the chest up.", "upper body"),
    ("Upper body shot, a boy explains", "upper body"),
    ("MEDIUM SHOT of a teacher at the board", "medium"),
    ("a chef, from the waist up, cuts onions", "medium"),
    ("waist-up framing of two men", "medium"),
    ("A medium long shot: the singer steps forward", "medium"),
    ("from the hips up, a man gestures", "medium"),
    ("Full-body shot of a dancer", "full"),
    ("a girl, full  length, in front of a wall", "full"),
    ("a woman visible from head to toe", "full"),
    ("Wide shot of people walking", "long"),
    ("an extreme long shot, a man on a dune", "long"),
    ("Ａ ｆｕｌｌ ｂｏｄｙ ｓｈｏｔ of a woman", "full"),
]
NOT_SAID = [
    "",
    "A man talks.",
    "a close-up of a cup of coffee",
    "a close-up of a man's hands",
    "they close up the shop",
    "she pulls her knees up",
    "dressed in black from head to toe",
    "she leans her upper body forward",
    "a woman in a full-length dress",
    "an upper body workout",
    "not a close-up",
    "without any full shot",
    "it is not over by a long shot",
    "the camera goes from a wide shot to a close-up of her face",
    "plano medio de una mujer",
]


@pytest.mark.parametrize(("caption", "framing"), SAID)
def test_a_clear_caption_names_the_framing(caption: str, framing: str) -> None:
    assert framing_in(caption) == framing


@pytest.mark.parametrize("caption", NOT_SAID)
def test_a_doubtful_caption_names_no_framing(caption: str) -> None:
    assert framing_in(caption) == ""


@given(st.text(), st.sampled_from(SAID), st.sampled_from(["\n", "  ", "\t"]))
def test_any_text_can_be_a_caption(noise: str, said: tuple[str, str], gap: str) -> None:
    assert framing_in(noise) in ("", *FRAMINGS)
    assert scene_in(noise) in ("", "indoor", "outdoor")
    names_a_person(noise)
    # White space and case do not count.
    assert framing_in(gap + said[0].upper().replace(" ", gap) + gap) == said[1]


@pytest.mark.parametrize(
    ("caption", "place"),
    [
        ("a man in an office", "indoor"),
        ("Indoors, a woman speaks", "indoor"),
        ("she walks down the street", "outdoor"),
        ("a couple, outdoors", "outdoor"),
        ("", ""),
        ("a man speaks", ""),
        ("from the kitchen to the garden", ""),
        ("in front of a poster of a beach", ""),
        ("not in the kitchen", ""),
    ],
)
def test_the_place_is_taken_from_the_caption(caption: str, place: str) -> None:
    assert scene_in(caption) == place


@pytest.mark.parametrize(
    ("caption", "somebody"),
    [
        ("A man talks", True),
        ("She sings", True),
        ("two dancers on a stage", True),
        ("the mountain lake", False),
        ("no people in view, and no cars", False),
        ("the mansion", False),
        ("", None),
        ("una mujer habla", None),
        # A name need not be a person's, and a word without a capital may be a name.
        ("Barack Obama at the lectern with a flag", None),
        ("A portrait of Merkel, with the flag", None),
        ("obama speaks at the lectern", None),
        ("Mr. Lee with the flag", None),
        ("The lake near New York and the Hudson. Trees and I.", None),
        ("The lake near New York. Trees, and the wind.", False),
    ],
)
def test_a_caption_names_a_person_or_not_or_is_doubtful(caption: str, somebody: bool | None) -> None:
    assert names_a_person(caption) is somebody


def test_a_very_long_caption_is_read_fast() -> None:
    denied = "no close-up of a man, " * 10_000
    assert framing_in(denied) == ""
    assert framing_in(denied + "Full shot.") == "full"
    assert names_a_person(denied) is True  # "of a man" is too far from its "no"
