"""A model behind an OpenAI-compatible chat endpoint: vLLM, llama.cpp, Ollama, or a service.

Pictures go as JPEG and sound as WAV inside the request. Nothing is sent to any other address (through a proxy where the
environment names one), the key never appears in a message, and an answer is read up to a bound, in size and in time.
"""

import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import time
import wave
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, field_validator

from data_manifests.strict import Strict
from tasks.chat import MAX_TOKENS, Answer, Turn
from tasks.clip import SAMPLE_RATE
from tasks.guidance_schema import clean
from tasks.stage import MissingBackend

if TYPE_CHECKING:
    import httpx

_CONNECT_S, _ANSWER_S = 10.0, 180.0  # at most, for a connection and for one whole answer
_TRIES = 5
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0  # between tries, twice as long each time
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # worth asking again
_MAX_ANSWER = 4_000_000  # bytes
_SAID = 300  # letters of a server's own message
_JPEG_QUALITY = 90
_OPTIONAL = ("response_format", "seed", "temperature", "max_tokens")  # left out for servers that refuse them

log = logging.getLogger(__name__)


class EndpointError(RuntimeError):
    """The endpoint gave no answer; the message says where and why, never the key."""


class EndpointSettings(Strict):
    """Where a model is and what it can do.

    base_url: such as http://localhost:8000/v1; requests go to its /chat/completions. model: its name there. key_env:
    the environment variable that holds the key; "" for a server that asks for none. sound: "wav" for a model that
    hears, "transcript" for one that is told what the manifest and the measurements say of the sound. requests: at most
    under way at once, over all workers of a run.
    """

    base_url: str = Field(max_length=500)
    model: str = Field(min_length=1, max_length=200)
    key_env: str = Field(default="", pattern=r"^([A-Z][A-Z0-9_]{0,99})?$")
    sound: Literal["wav", "transcript"] = "wav"
    requests: int = Field(default=8, ge=1, le=256)

    @field_validator("base_url")
    @classmethod
    def _plain(cls, base_url: str) -> str:
        try:
            parts = urlsplit(base_url)
            known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
        except ValueError:  # its message would repeat what may be a password
            known = False
        if not known or re.search(r"[^\x21-\x7e]", base_url):
            raise ValueError("is no http or https address, such as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("has a user, a password or a query in it; a key belongs into an environment variable")
        return base_url.rstrip("/")


class ChatEndpoint:
    """A talk with the model of an endpoint, one request at a time."""

    def __init__(self, settings: EndpointSettings) -> None:
        import httpx

        self._settings, self._key = settings, _key(settings)
        # redirects are not followed: they could lead the pictures and the key anywhere
        self._client = httpx.Client(
            timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
            follow_redirects=False,
            headers={
                "Accept-Encoding": "identity",  # so that the bound on an answer's size is one on what is unpacked
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
        )
        self._refused: set[str] = set()

    def check(self) -> None:
        """See that somebody answers there and takes the key. Raises MissingBackend."""
        where = self._settings.base_url
        failures: tuple[type[Exception], ...] = (*_transport_errors(), EndpointError)
        try:
            status, _, data = self._once("GET", f"{where}/models", None)
        except failures as error:
            raise MissingBackend(
                f"guidance.endpoint: nobody answers at {where}: {self._plain(error)}; start the server there, or "
                "correct base_url. guidance's backend `templates` serves without"
            ) from None
        if status in (401, 403):
            named = f"the key in {self._settings.key_env}" if self._key else "a request without a key (see key_env)"
            raise MissingBackend(f"guidance.endpoint: {where} refuses {named}: {self._said(data)}")
        if urlsplit(where).hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("guidance: pictures and sound of every clip are sent to %s", where)

    def __call__(self, turns: Sequence[Turn], schema: Mapping[str, Any] | None = None) -> Answer:
        """The model's answer. Raises EndpointError."""
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [_message(turn) for turn in turns],
            "temperature": 0,
            "seed": 0,
            "max_tokens": MAX_TOKENS,
        }
        if schema is not None:
            form = {"name": str(schema.get("title", "answer")), "strict": True, "schema": dict(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        # what a server does not know it will not know later; what is too long for it may be shorter the next time
        refused, lasting = set(self._refused), set[str]()
        while True:
            status, data = self._asked({name: value for name, value in body.items() if name not in refused})
            if status == 200:
                self._refused |= lasting
                return Answer(self._text(data))
            said = self._said(data)
            left = set(_OPTIONAL).intersection(body) - refused if status in (400, 422) else set()
            # not every server names what it does not know; then it is most likely the newest of them
            again = {name for name in left if name in said} or left & {"response_format"}
            if not any(word in said.lower() for word in ("context", "length", "too long")):
                lasting |= again
            if not again:
                raise EndpointError(f"{self._settings.base_url} answers {status}: {said}")
            refused |= again

    def _asked(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and content, after as many tries as a busy server is worth."""
        content = json.dumps(body).encode()
        for tried in range(1, _TRIES + 1):
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (tried - 1))
            try:
                with self._place():
                    status, headers, data = self._once("POST", f"{self._settings.base_url}/chat/completions", content)
            except _transport_errors() as error:
                why = self._plain(error)
            else:
                if status not in _BUSY:
                    return status, data
                why = f"{status}: {self._said(data)}"
                asked = re.fullmatch(r"\d{1,6}", headers.get("retry-after", "").strip())
                wait = min(_LONGEST_WAIT_S, float(asked[0])) if asked else wait
            if tried < _TRIES:
                time.sleep(wait)
        raise EndpointError(f"{self._settings.base_url} gives no answer after {_TRIES} tries: {why}")

    def _once(self, method: str, url: str, content: bytes | None) -> tuple[int, "httpx.Headers", bytes]:
        """Status, headers and content of one request. Raises httpx's errors, TimeoutError, EndpointError."""
        headers = {"Content-Type": "application/json"} if content is not None else {}
        until, data = time.monotonic() + _ANSWER_S, bytearray()
        with self._client.stream(method, url, content=content, headers=headers) as response:
            if response.is_redirect:
                where = urlsplit(response.headers.get("location", "")).hostname or "another path"
                raise EndpointError(
                    f"{self._settings.base_url} redirects to {clean(where, 100)}, and nothing is sent to where a "
                    "server points; write the right address into base_url"
                )
            for part in response.iter_bytes():
                data += part
                if len(data) > _MAX_ANSWER:
                    raise EndpointError(f"{self._settings.base_url} answers with more than {_MAX_ANSWER:,} bytes")
                # the client's own limit holds between two bytes only
                if time.monotonic() > until:
                    raise TimeoutError(f"no whole answer in {_ANSWER_S:g} s")
            return response.status_code, response.headers, bytes(data)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Hold one of the places of `requests`, which all workers of a run share by their folder of temporary files."""
        from filelock import FileLock, Timeout

        name = hashlib.sha256(self._settings.base_url.encode()).hexdigest()[:12]
        while True:
            for number in range(self._settings.requests):
                lock = FileLock(Path(tempfile.gettempdir()) / f"understudy-request-{name}-{number}.lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                try:
                    yield
                finally:
                    lock.release()
                return
            time.sleep(0.05)

    def _text(self, data: bytes) -> str:
        """The words of an answer: the first choice's."""
        try:
            choice = json.loads(data)["choices"][0]
            message = choice["message"]
            content = message.get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise EndpointError(
                f"{self._settings.base_url} answers in another form than a chat's: {self._hidden(data)[:_SAID]}"
            ) from None
        if isinstance(content, list):  # in parts
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        if not isinstance(content, str) or not content.strip():
            why = message.get("refusal") or choice.get("finish_reason") or "no reason given"
            raise EndpointError(f"the model says nothing: {self._hidden(str(why))}")
        return content

    def _said(self, data: bytes) -> str:
        """What a server says of an error."""
        try:
            error = json.loads(data)
            error = error.get("error", error.get("detail", error))
            said = error.get("message") if isinstance(error, dict) else error
        except (ValueError, AttributeError, RecursionError):
            said = None
        return self._hidden(said if isinstance(said, str) else data[: 2 * _SAID])

    def _plain(self, error: Exception) -> str:
        return self._hidden(f"{type(error).__name__}: {error}")

    def _hidden(self, said: str | bytes) -> str:
        """A server's words on one line, without the key, which some repeat."""
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
        return clean(text.replace(self._key, "***") if self._key else text, _SAID)


def _key(settings: EndpointSettings) -> str:
    if not settings.key_env:
        return ""
    key = os.environ.get(settings.key_env, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise MissingBackend(
            f"guidance.endpoint.key_env: the environment variable {settings.key_env} holds no key; export it, or leave "
            "key_env out for a server that asks for none. guidance's backend `templates` serves without"
        )
    return key


def _transport_errors() -> tuple[type[Exception], ...]:
    import httpx

    return (httpx.TransportError, httpx.DecodingError, httpx.InvalidURL, TimeoutError)


def _message(turn: Turn) -> dict[str, Any]:
    if not turn.images and turn.sound is None:
        return {"role": turn.role, "content": turn.text}
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_base64(_jpeg(image))}"}}
        for image in turn.images
    ]
    if turn.sound is not None:
        parts.append({"type": "input_audio", "input_audio": {"data": _base64(_wav(turn.sound)), "format": "wav"}})
    return {"role": turn.role, "content": [*parts, {"type": "text", "text": turn.text}]}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def _wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SAMPLE_RATE)
        sound.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return file.getvalue()
