"""`decide` against a simple reference that decides clip by clip, and at the edges of each kind of rule."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.strict import validate
from tasks.policy.decide import alive, decide, funnel, join, rule_results
from tasks.policy.rules import Policy, Rule

STAGES = ("people", "motion", "speech")
COLUMNS: dict[str, dict[str, type]] = {
    "people": {"share": float, "framing": str},
    "motion": {"speed": float, "jolts": int},
    "speech": {"fraction": float, "music": bool},
}
VALUES: dict[type, st.SearchStrategy[Any]] = {
    float: st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    int: st.integers(0, 4),
    bool: st.booleans(),
    str: st.sampled_from(["long", "full", "medium", ""]),
}


def policy_of(**sections: Any) -> Policy:
    return validate(Policy, sections, "policy")


def rule(score: str, **demand: Any) -> dict[str, Any]:
    return {"score": score, "backend": "b", **demand}


def frame_of(clips: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """A frame made by `join`. clips: by clip_id; for each stage no row (None), an error (text) or values by column."""
    index = list(clips)
    base = pd.DataFrame({name: [clips[c][name] for c in index] for name in ("duration_s", "audio")}, index=index)
    tables = {}
    for stage, columns in COLUMNS.items():
        rows = []
        for clip_id in index:
            found = clips[clip_id][stage]
            if found is None:
                continue
            row = {"key": clip_id, "status": "ok", "error": "", "inputs": ""}
            rows.append(row | ({"status": "error", "error": found} if isinstance(found, str) else found))
        table = pd.DataFrame(rows, columns=["key", "status", "error", "inputs", *columns])
        types = {float: "float64", int: "Int64", bool: "boolean", str: "str"}
        tables[stage] = table.astype({name: types[kind] for name, kind in columns.items()})
    return join(base, tables)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Clips as `frame_of` takes them."""

    def clip() -> dict[str, Any]:
        found: dict[str, Any] = {
            "duration_s": draw(st.sampled_from([2.0, 5.0, 10.0])),
            "audio": draw(st.sampled_from(["a.flac", ""])),
        }
        for stage, columns in COLUMNS.items():
            state = draw(st.sampled_from(["ok", "ok", "ok", "ok", "error", "pending"]))
            values = {name: draw(st.none() | VALUES[kind]) for name, kind in columns.items()}
            found[stage] = {"ok": values, "error": f"{stage} broke", "pending": None}[state]
        return found

    names = draw(st.lists(st.integers(0, 999), unique=True, max_size=12))
    return {f"{n:03d}": clip() for n in names}


@st.composite
def rule_of_any_kind(draw: st.DrawFn) -> dict[str, Any]:
    stage = draw(st.sampled_from(STAGES))
    column = draw(st.sampled_from(sorted(COLUMNS[stage])))
    kind = COLUMNS[stage][column]
    made = rule(f"{stage}.{column}", missing=draw(st.sampled_from(["pass", "reject", "error"])))
    if kind in (bool, str):
        return made | {"one_of": draw(st.lists(VALUES[kind], min_size=1, unique=True))}
    bounds = sorted([draw(VALUES[kind]), draw(VALUES[kind])])
    which = draw(st.sampled_from(["min", "max", "both"]))
    return made | ({"min": bounds[0]} if which != "max" else {}) | ({"max": bounds[1]} if which != "min" else {})


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    kinds = rule_of_any_kind()
    rules = {f"r{i}": draw(kinds) for i in range(draw(st.integers(0, 3)))}
    audio = {f"a{i}": draw(kinds) for i in range(draw(st.integers(0, 2)))}
    tiers: dict[str, Any] = {"main": {}, "mid": {"rules": {"t": draw(kinds)}}}
    rank = {"motion.speed": draw(st.sampled_from([1.0, -1.0, 2.0])), "speech.fraction": 1.0}
    tiers["top"] = {"hours": draw(st.sampled_from([5.0, 12.0, 100.0])) / 3600, "rank": rank}
    return policy_of(rules=rules, audio=audio, on_unusable=draw(st.sampled_from(["keep", "drop"])), tiers=tiers)


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def outcome(r: Rule, value: Any) -> str:
    """The result of one rule for one value: pass, reject or error."""
    if is_missing(value):
        return r.missing
    if r.one_of is not None:
        return "pass" if any(type(v) is type(value) and v == value for v in r.one_of) else "reject"
    return "reject" if (r.min is not None and value < r.min) or (r.max is not None and value > r.max) else "pass"


def verdict_of(clip: dict[str, Any], policy: Policy, stages: tuple[str, ...] = STAGES) -> tuple[str, str, str]:
    """(verdict, stage, rule) of one clip, by the simplest reading of what `decide` promises."""
    if policy.on_unusable == "drop" and not clip["audio"]:
        return "drop", "clips", "sound"
    for stage in stages:
        row = clip[stage]
        if row is None:
            return "pending", stage, ""
        if isinstance(row, str):
            return "error", stage, ""
        for name, r in (policy.rules | policy.audio).items():
            if r.stage != stage or (name in policy.audio and not clip["audio"]):
                continue
            result = outcome(r, row[r.column])
            if result == "error":
                return "error", stage, name
            if result == "reject" and (name in policy.rules or policy.on_unusable == "drop"):
                return "drop", stage, name
    return "keep", "", ""


def audio_of(clip: dict[str, Any], policy: Policy) -> tuple[str, str]:
    """(audio, audio_rule) of one clip."""
    if not clip["audio"]:
        return "none", ""
    for name, r in policy.audio.items():
        row = clip[r.stage]
        result = outcome(r, row[r.column]) if isinstance(row, dict) else "error"
        if result != "pass":
            return ("unusable", name) if result == "reject" else ("", "")
    return "usable", ""


def tiers_of(clips: dict[str, dict[str, Any]], policy: Policy, kept: list[str]) -> dict[str, str]:
    """The narrowest tier of each kept clip."""
    found = dict.fromkeys(kept, "main")
    inside = kept
    for name, tier in list(policy.tiers.items())[1:]:
        inside = [
            c for c in inside if all(outcome(r, clips[c][r.stage][r.column]) == "pass" for r in tier.rules.values())
        ]
        if tier.hours is not None:
            standing = dict.fromkeys(inside, 0.0)
            for score, weight in tier.rank.items():
                stage, column = score.split(".")
                values = {c: clips[c][stage][column] for c in inside}
                known = [v for v in values.values() if not is_missing(v)]
                for c, v in values.items():
                    if not is_missing(v):
                        worse = sum(w < v if weight > 0 else w > v for w in known)
                        same = sum(w == v for w in known)
                        standing[c] += abs(weight) * (worse + (same + 1) / 2) / len(known)
            best: list[str] = []
            seconds = 0.0
            for c in sorted(inside, key=lambda c: (-round(standing[c], 7), c)):
                seconds += clips[c]["duration_s"]
                if seconds > tier.hours * 3600 + 1e-6:
                    break
                best.append(c)
            inside = best
        found |= dict.fromkeys(inside, name)
    return found


@given(rows(), policies())
@settings(max_examples=50, deadline=None)
def test_decisions_agree_with_the_clip_by_clip_reference(clips: dict[str, dict[str, Any]], policy: Policy) -> None:
    frame = frame_of(clips)
    decisions = decide(frame, policy, STAGES)
    assert list(decisions.index) == sorted(clips)
    wanted = {c: verdict_of(clips[c], policy) for c in clips}
    tiers = tiers_of(clips, policy, [c for c in sorted(clips) if wanted[c][0] == "keep"])
    for c, got in decisions.to_dict("index").items():
        assert (got["verdict"], got["stage"], got["rule"]) == wanted[c]
        assert (got["audio"], got["audio_rule"]) == audio_of(clips[c], policy)
        assert got["tier"] == tiers.get(c, "")
        assert bool(got["error"]) == (got["verdict"] == "error")
        assert bool(got["threshold"]) == (got["verdict"] == "drop")
        if got["verdict"] == "drop" and got["rule"] != "sound":
            value = clips[c][got["stage"]][(policy.rules | policy.audio)[got["rule"]].column]
            text = "" if is_missing(value) else value
            assert got["value"] == text or json.loads(got["value"]) == text
    through = alive(frame, policy, STAGES[:2])
    assert {c: bool(through[c]) for c in clips} == {
        c: verdict_of(clips[c], policy, STAGES[:2])[0] == "keep" for c in clips
    }
    check_funnel(frame, decisions, policy)


def check_funnel(frame: pd.DataFrame, decisions: pd.DataFrame, policy: Policy) -> None:
    """Check that every clip, with its whole duration, is in exactly one of dropped, error, pending and kept."""
    table = funnel(frame, decisions, policy, STAGES)
    ends = table[table["what"].isin(["dropped", "error", "pending", "kept"])]
    assert ends["clips"].sum() == len(frame)
    assert ends["hours"].sum() == pytest.approx(frame["clips.duration_s"].sum() / 3600)
    count = table.groupby("what")["clips"].sum()
    assert count["error"] == (decisions["verdict"] == "error").sum()
    assert table[table["what"] == "tier"]["clips"].is_monotonic_decreasing
    left = table[table["what"] == "left"]["clips"]
    assert left.is_monotonic_decreasing and left.iloc[-1] == count["kept"]


@given(
    rows(),
    st.sampled_from(["min", "max"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_a_moved_threshold_changes_the_verdict_only_of_clips_between_the_old_and_the_new_one(
    clips: dict[str, dict[str, Any]], side: str, before: float, after: float
) -> None:
    frame = frame_of(clips)
    verdicts = [
        decide(frame, policy_of(rules={"moves": rule("motion.speed", **{side: bound})}), STAGES)["verdict"]
        for bound in (before, after)
    ]
    low, high = sorted([before, after])
    speed = frame["motion.speed"]
    # a value equal to the threshold passes
    between = (speed >= low) & (speed < high) if side == "min" else (speed > low) & (speed <= high)
    flipped = verdicts[0].astype(str) != verdicts[1].astype(str)
    assert not (flipped & ~between).any()


def clip_with(**stages: Any) -> dict[str, Any]:
    """A clip of 4 s with sound, as `frame_of` takes it. stages: its values by column, or an error; else no values."""
    row: dict[str, Any] = {"duration_s": 4.0, "audio": "a.flac"}
    row |= {stage: dict.fromkeys(columns) for stage, columns in COLUMNS.items()}
    for stage, found in stages.items():
        row[stage] = row[stage] | found if isinstance(found, dict) else found
    return row


def test_a_drop_names_its_rule_value_and_threshold() -> None:
    policy = policy_of(
        rules={"moves": rule("motion.speed", min=0.3, max=20), "near": rule("people.framing", one_of=["full"])}
    )
    frame = frame_of(
        {
            "a": clip_with(people={"framing": "long"}, motion={"speed": 0.1}),
            "b": clip_with(people={"framing": "full"}, motion={"speed": 0.1}),
            "c": clip_with(people={"framing": "full"}, motion={"speed": 0.3}),
        }
    )
    got = (
        decide(frame, policy, STAGES)[["verdict", "stage", "rule", "value", "threshold"]]
        .astype(str)
        .to_numpy()
        .tolist()
    )
    assert got == [
        ["drop", "people", "near", "long", "one of full"],  # the order of the stages counts, not that of the rules
        ["drop", "motion", "moves", "0.1", "0.3 to 20"],
        ["keep", "", "", "", ""],
    ]


def test_an_error_is_not_a_rejection_unless_an_earlier_stage_rejected_the_clip() -> None:
    policy = policy_of(rules={"seen": rule("people.share", min=0.5), "moves": rule("motion.speed", min=0.5)})
    frame = frame_of(
        {
            "a": clip_with(people={"share": 0.1}, motion="DecodeError: bad packet"),
            "b": clip_with(people={"share": 0.9}, motion="DecodeError: bad packet"),
            "c": clip_with(people="DecodeError: bad packet", motion={"speed": 0.0}),
            "d": clip_with(people={"share": None}),
        }
    )
    got = decide(frame, policy, STAGES)
    assert got["verdict"].tolist() == ["drop", "error", "error", "error"]
    assert got["error"].tolist()[1:] == ["DecodeError: bad packet"] * 2 + ["people.share has no value for this clip"]
    assert alive(frame, policy, ["people"]).tolist() == [False, True, False, False]


def test_poor_sound_costs_a_clip_its_sound_or_the_clip_as_the_recipe_says() -> None:
    clips = {
        "a": clip_with(speech={"fraction": 0.9}),
        "b": clip_with(speech={"fraction": 0.1}),
        "c": clip_with() | {"audio": ""},
    }
    for frame_row in clips.values():
        frame_row["people"] = frame_row["motion"] = {}
    spoken = {"spoken": rule("speech.fraction", min=0.5)}
    kept = decide(frame_of(clips), policy_of(audio=spoken), STAGES)
    assert kept["verdict"].tolist() == ["keep"] * 3
    assert kept["audio"].tolist() == ["usable", "unusable", "none"]
    assert kept.loc["b", ["audio_rule", "audio_value", "audio_threshold"]].tolist() == ["spoken", "0.1", ">= 0.5"]
    dropped = decide(frame_of(clips), policy_of(audio=spoken, on_unusable="drop"), STAGES)
    assert dropped["verdict"].tolist() == ["keep", "drop", "drop"]
    assert dropped["rule"].tolist() == ["", "spoken", "sound"]


def test_the_best_hours_are_the_same_whatever_the_order_of_rows() -> None:
    rng = np.random.default_rng(1)
    clips = {f"{i:03d}": clip_with(motion={"speed": float(rng.integers(0, 5)) / 4}) for i in range(200)}
    policy = policy_of(tiers={"main": {}, "hq": {"hours": 100 / 3600, "rank": {"motion.speed": 1.0}}})
    frame = frame_of(clips)
    ordered = decide(frame, policy, STAGES)["tier"].astype(str)
    shuffled = decide(frame.sample(frac=1, random_state=2), policy, STAGES)["tier"].astype(str).sort_index()
    assert (ordered == "hq").sum() == 25
    pd.testing.assert_series_equal(ordered, shuffled)


def test_a_rank_weighs_scores_less_is_better_by_a_negative_weight_and_no_value_comes_last() -> None:
    found = {"a": (0.0, 0.5), "b": (0.25, 0.5), "c": (1.0, 0.75), "d": (None, 0.75), "e": (0.5, None)}
    clips = {name: clip_with(motion={"speed": speed}, speech={"fraction": f}) for name, (speed, f) in found.items()}

    def best(clips_wanted: int, **rank: float) -> str:
        scores = {"motion.speed": rank["speed"]} | ({"speech.fraction": rank["speech"]} if "speech" in rank else {})
        policy = policy_of(tiers={"main": {}, "hq": {"hours": clips_wanted * 4 / 3600, "rank": scores}})
        tier = decide(frame_of(clips), policy, STAGES)["tier"]
        return "".join(tier.index[tier == "hq"])

    assert [best(n, speed=1.0) for n in (1, 2, 3, 4, 5)] == ["c", "ce", "bce", "abce", "abcde"]
    assert [best(n, speed=-1.0) for n in (1, 2, 3, 4)] == ["a", "ab", "abe", "abce"]
    assert [best(n, speed=-1.0, speech=9.0) for n in (1, 2, 3)] == ["c", "cd", "acd"]


def test_lineage_gets_every_rule_with_its_value_and_result() -> None:
    policy = policy_of(
        rules={"moves": rule("motion.speed", min=0.5)},
        audio={"spoken": rule("speech.fraction", min=0.5)},
        tiers={"main": {}, "hq": {"rules": {"calm": rule("motion.jolts", max=2)}}},
    )
    row = frame_of({"a": clip_with(motion={"speed": 0.75, "jolts": 3})}).to_dict("records")[0]
    results = rule_results(row, policy)
    assert {place: (r["value"], r["passed"]) for place, r in results.items()} == {
        "rules.moves": (0.75, True),
        "audio.spoken": (None, None),
        "tiers.hq.rules.calm": (3, False),
    }


def test_the_first_of_several_copies_that_pass_is_kept_and_the_others_name_it() -> None:
    hashes = {"picture": ["0" * 64, "0" * 63 + "1", "f" * 64, "0" * 64], "sound": ["a" * 32] * 4}
    index = ["dddddddddddddddd-clip", "cccccccccccccccc-clip", "bbbbbbbbbbbbbbbb-clip", "aaaaaaaaaaaaaaaa-clip"]
    base = pd.DataFrame({"duration_s": 5.0, "audio": "x.flac"}, index=index)
    row = {"key": index, "status": "ok", "error": ""}
    tables = {
        "duplicates": pd.DataFrame(row | hashes),
        "motion": pd.DataFrame(row | {"speed": [1.0, 1.0, 1.0, 9.0]}),
    }
    policy = policy_of(
        rules={"calm": rule("motion.speed", max=5)},
        near_duplicates={"backend": "phash", "picture_bits": 4, "sound_bits": 4},
    )
    frame = join(base, tables)
    decisions = decide(frame, policy, ["duplicates", "motion"])
    # a rule drops the copy with the lowest clip_id, so the next one is kept
    assert dict(decisions["verdict"]) == {
        "aaaaaaaaaaaaaaaa-clip": "drop",
        "bbbbbbbbbbbbbbbb-clip": "keep",
        "cccccccccccccccc-clip": "keep",
        "dddddddddddddddd-clip": "drop",
    }
    # the order of the rows does not matter
    others = decide(frame.iloc[[2, 0, 3, 1]], policy, ["duplicates", "motion"]).sort_index()
    assert others.astype("str").equals(decisions.astype("str"))
    dropped = decisions.loc["dddddddddddddddd-clip"]
    assert (dropped["stage"], dropped["rule"], dropped["value"]) == (
        "duplicates",
        "near_duplicate",
        "cccccccccccccccc-clip",
    )
    lines = funnel(frame, decisions, policy, ["duplicates", "motion"])
    assert lines[lines["what"] == "dropped"]["clips"].sum() == 2 and lines[lines["what"] == "kept"]["clips"].sum() == 2
