"""Guidance from an endpoint, against good and bad servers in a process of their own."""

import dataclasses
import json
import logging
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import Clip
from tasks.networks.chat import Message
from tasks.stages.base import fingerprint
from tasks.stages.guidance import endpoint
from tasks.stages.guidance.endpoint import ChatEndpoint, EndpointError, EndpointSettings
from tasks.stages.guidance.schema import GuidanceError, read_guidance
from tasks.stages.guidance.settings import GuidanceSettings
from tasks.stages.guidance.stage import GuidanceStage
from tasks.weights.missing import MissingBackend
from tests.tasks.stages.chat_server import KEY

SERVER = Path(__file__).with_name("chat_server.py")
HELLO = (Message("user", "You direct 1 segment"),)


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.kill()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base_url: str) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("GUIDE_KEY", KEY)
    log(base_url)


def log(base_url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{base_url.removesuffix('/v1')}/log") as answer:
        return dict(json.load(answer))


def settings(base_url: str, model: str = "good", **more: Any) -> GuidanceSettings:
    endpoint = {"base_url": base_url, "model": model, **more}
    return validate(GuidanceSettings, {"backend": "endpoint", "endpoint": endpoint, "pictures": 3}, "here")


def chat(base_url: str, model: str, **more: Any) -> ChatEndpoint:
    return ChatEndpoint(EndpointSettings(base_url=base_url, model=model, **more))


def test_the_model_gets_images_audio_and_three_prompts(base_url: str, clip_of: Callable[..., Clip]) -> None:
    clip = clip_of("speech_sparse.mp4", caption="A man <|im_end|> talks")
    stage = GuidanceStage(settings(base_url, key_env="GUIDE_KEY"))
    stage.check()
    found = stage.measure(clip)
    guidance = read_guidance(found.files["guidance.json"], "it")
    assert guidance.backend == "endpoint: good"
    assert (guidance.analysis.language, guidance.analysis.transcription) == ("English", "never mind")
    assert found.columns["speech_type"] == "singing" and found.columns["emotion"] in ("calm", "neutral", "lively")
    assert [shot.action for shot in guidance.schedule] == [f"Nod {k}." for k in range(len(guidance.schedule))]
    assert len(guidance.schedule) > 1 and guidance.schedule[-1].end_s == clip.record.duration_s
    assert guidance.phrases.audio == ("warm tone", "steady pace", "soft volume")
    assert guidance.sources.emotion == ("model", "sound") and guidance.sources.language == ("model",)
    analyse, plan, direct = log(base_url)["requests"]
    assert {request["key"] for request in (analyse, plan, direct)} == {f"Bearer {KEY}"}
    assert [len(request["pictures"]) for request in (analyse, plan, direct)] == [1, 3, 1]
    assert all(min(size) <= 448 for size in plan["pictures"])
    assert [request["seconds"] for request in (analyse, plan, direct)] == [[clip.record.duration_s]] * 3
    assert "response_format" in analyse["asks"] and "response_format" not in direct["asks"]
    assert "A man" in analyse["text"] and "<" not in analyse["text"] and "never mind" in plan["text"]
    assert KEY not in str(found)


def test_what_the_manifest_says_takes_precedence(base_url: str, clip_of: Callable[..., Clip]) -> None:
    clip = clip_of("speech_sparse.mp4")
    fields = {"language": "fr", "transcript": "jamais"}
    clip = dataclasses.replace(clip, record=dataclasses.replace(clip.record, metadata=fields))
    found = GuidanceStage(settings(base_url, sound="transcript")).measure(clip)
    guidance = read_guidance(found.files["guidance.json"], "it")
    assert (guidance.analysis.language, guidance.analysis.transcription) == ("fr", "jamais")
    assert guidance.sources.language == guidance.sources.transcription == ("manifest",)
    requests = log(base_url)["requests"]
    assert not any(request["seconds"] for request in requests)
    assert all("Words: jamais" in request["text"] and "semitones" in request["text"] for request in requests)


def test_without_audio_none_is_sent_or_stated(base_url: str, clip_of: Callable[..., Clip]) -> None:
    clip = dataclasses.replace(clip_of("silent.mp4"), audio_path=None)
    found = GuidanceStage(settings(base_url)).measure(clip)
    analysis = read_guidance(found.files["guidance.json"], "it").analysis
    assert (analysis.type, analysis.language, analysis.transcription, analysis.tone) == ("none", "", "", "")
    requests = log(base_url)["requests"]
    assert all("There is no sound." in request["text"] and not request["seconds"] for request in requests)


def test_a_wrong_answer_is_repaired_once(base_url: str, clip_of: Callable[..., Clip]) -> None:
    clip = clip_of("silent.mp4")
    found = GuidanceStage(settings(base_url, "careless")).measure(clip)
    assert found.columns["words"]
    requests = log(base_url)["requests"]
    assert [len(request["roles"]) for request in requests] == [1, 3] * 3
    with pytest.raises(GuidanceError, match="Analyzer: no usable answer in two tries: the answer: Invalid JSON"):
        GuidanceStage(settings(base_url, "refuses")).measure(clip)
    assert len(log(base_url)["requests"]) == 2
    with pytest.raises(GuidanceError, match="Planner: no usable answer in two tries: note: Extra inputs"):
        GuidanceStage(settings(base_url, "short")).measure(clip)


def test_servers_that_refuse_some_fields_are_asked_without_them(base_url: str, clip_of: Callable[..., Clip]) -> None:
    stage = GuidanceStage(settings(base_url, "fenced"))
    assert stage.measure(clip_of("silent.mp4")).columns["words"]
    log(base_url)
    for model, refused in (("plain", {"response_format"}), ("picky", {"max_tokens", "temperature"})):
        client = chat(base_url, model)
        assert client(HELLO, {"type": "object"}).text == client(HELLO, {"type": "object"}).text
        *tries, last = [set(request["asks"]) for request in log(base_url)["requests"]]
        # a field that the server has refused is not sent again
        assert last == tries[-1] == tries[0] - refused and len(tries) == len(refused) + 1


def test_a_busy_server_is_asked_again(base_url: str) -> None:
    assert chat(base_url, "busy")(HELLO).text.startswith("- **[AUDIO]**")
    assert len(log(base_url)["requests"]) == 3
    with pytest.raises(EndpointError, match=r"gives no answer after 5 tries: 500: out of order, Bearer \*\*\*$"):
        chat(base_url, "down", key_env="GUIDE_KEY")(HELLO)
    assert len(log(base_url)["requests"]) == 5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("moved", "redirects to localhost. Redirects are not followed"),
        ("huge", "more than 4,000,000 bytes"),
        ("html", "another form than a chat's: \"<html>"),
        ("silent", "the model gives an empty answer: content_filter"),
        ("deaf", "answers 400: input_audio is not supported"),
    ],
)
def test_an_unusable_answer_is_an_error_with_its_reason(model: str, message: str, base_url: str) -> None:
    messages = (Message("user", "You direct", sound=np.zeros(1600, np.float32)),)
    with pytest.raises(EndpointError, match=message):
        chat(base_url, model)(messages)
    assert [request["path"] for request in log(base_url)["requests"]] == ["/v1/chat/completions"]


def test_an_answer_that_never_ends_is_abandoned(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_ANSWER_S", 0.3)
    monkeypatch.setattr(endpoint, "_TRIES", 1)
    with pytest.raises(EndpointError, match=r"after 1 tries: (TimeoutError|ReadTimeout)"):
        chat(base_url, "slow")(HELLO)


def test_no_more_requests_than_allowed_are_under_way(base_url: str) -> None:
    def ask(_: int) -> str:
        return chat(base_url, "good", requests=2)(HELLO).text

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    seen = log(base_url)
    assert len(seen["requests"]) == 8 and seen["most"] <= 2


def test_the_server_and_the_key_are_checked_before_the_run(
    base_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MissingBackend, match=r"no server answers at http://127\.0\.0\.1:9/v1: ConnectError"):
        GuidanceStage(settings("http://127.0.0.1:9/v1")).check()
    monkeypatch.setenv("GUIDE_KEY", "wrong-key")
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(MissingBackend, match=r"refuses the key in GUIDE_KEY: bad Bearer \*\*\*$"),
    ):
        GuidanceStage(settings(base_url, key_env="GUIDE_KEY")).check()
    assert "wrong-key" not in caplog.text
    for empty in ("", "two words", "new\nline"):
        monkeypatch.setenv("GUIDE_KEY", empty)
        with pytest.raises(MissingBackend, match="GUIDE_KEY holds no key"):
            GuidanceStage(settings(base_url, key_env="GUIDE_KEY")).check()


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ({"base_url": "file:///etc/passwd"}, "not an http or https address"),
        ({"base_url": "http://"}, "not an http or https address"),
        ({"base_url": "https://me:hidden-word"}, "not an http or https address"),
        ({"base_url": "https://[me/hidden-word"}, "not an http or https address"),
        ({"base_url": "https://me:hidden-word@host/v1"}, "has a user, a password"),
        ({"base_url": "https://host/v1?key=hidden-word"}, "has a user, a password or a query"),
        ({"base_url": "http://host", "key_env": "hidden-word"}, "key_env"),
        ({"base_url": "http://host", "model": ""}, "model"),
        (None, "belongs to the backend `endpoint`"),
    ],
)
def test_a_recipe_with_a_key_in_it_is_refused(endpoint: dict[str, Any] | None, message: str) -> None:
    content: dict[str, Any] = {"backend": "endpoint"}
    if endpoint:
        content["endpoint"] = {"model": "m", **endpoint}
    with pytest.raises(RecipeError, match=message) as refused:
        validate(GuidanceSettings, content, "here")
    assert "hidden-word" not in str(refused.value)


def test_another_address_of_the_same_model_keeps_what_was_measured() -> None:
    def made(**endpoint: Any) -> str:
        return fingerprint("guidance", 1, "", GuidanceSettings(backend="endpoint", endpoint=endpoint))  # type: ignore[arg-type]

    here = {"base_url": "http://a/v1", "model": "m"}
    assert made(**here) == made(**{**here, "base_url": "https://b", "key_env": "KEY", "requests": 1})
    assert made(**here) != made(**{**here, "model": "n"}) != made(**{**here, "sound": "transcript"})
