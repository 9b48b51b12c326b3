"""A chat model behind an OpenAI-compatible HTTP endpoint: vLLM, llama.cpp, Ollama, or a service.

Images are sent as JPEG and audio as WAV inside the request. Requests go to the configured address alone (through a
proxy where the environment names one). The key never appears in a log or an error message. An answer is read up to a
limit in bytes and in time.
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
from tasks.media.clip import SAMPLE_RATE
from tasks.networks.chat import MAX_TOKENS, Answer, Message
from tasks.stages.guidance.schema import clean
from tasks.weights.missing import MissingBackend

if TYPE_CHECKING:
    import httpx

_CONNECT_S, _ANSWER_S = 10.0, 180.0  # limits for a connection and for one whole answer
_TRIES = 5
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0  # between tries; each wait is twice the one before
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # HTTP statuses after which a request is repeated
_MAX_ANSWER = 4_000_000  # bytes
_MAX_QUOTE = 300  # characters of a server's message that an error quotes
_JPEG_QUALITY = 90
_OPTIONAL = ("response_format", "seed", "temperature", "max_tokens")  # fields left out for a server that refuses them

log = logging.getLogger(__name__)


class EndpointError(RuntimeError):
    """The endpoint gave no usable answer. The message says where and why, and never holds the key."""


class EndpointSettings(Strict):
    """The address of a server, the model to ask there, and what that model takes."""

    base_url: str = Field(max_length=500)
    """The address, such as http://localhost:8000/v1. Requests go to its /chat/completions."""
    model: str = Field(min_length=1, max_length=200)
    """The model's name at the server."""
    key_env: str = Field(default="", pattern=r"^([A-Z][A-Z0-9_]{0,99})?$")
    """The environment variable that holds the key; "" for a server that needs no key."""
    sound: Literal["wav", "transcript"] = "wav"
    """How the model learns of the audio. "wav" sends it. "transcript", for a model that takes no audio, sends what the
    manifest and the measurements say of it."""
    requests: int = Field(default=8, ge=1, le=256)
    """Requests under way at the same time, at most, over all workers of a run."""

    @field_validator("base_url")
    @classmethod
    def _is_plain_address(cls, base_url: str) -> str:
        try:
            parts = urlsplit(base_url)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
        except ValueError:  # its own message is dropped: it may quote a password
            valid = False
        if not valid or re.search(r"[^\x21-\x7e]", base_url):
            raise ValueError("is not an http or https address, such as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("has a user, a password or a query in it; put the key into an environment variable")
        return base_url.rstrip("/")


class ChatEndpoint:
    """A tasks.networks.chat.Chat whose model is behind an endpoint. It sends one request at a time."""

    def __init__(self, settings: EndpointSettings) -> None:
        import httpx

        self._settings, self._key = settings, _key(settings)
        # redirects are not followed: they could send the images and the key anywhere
        self._client = httpx.Client(
            timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
            follow_redirects=False,
            headers={
                "Accept-Encoding": "identity",  # without compression the limit on bytes holds for the decoded answer
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
        )
        self._refused: set[str] = set()

    def check(self) -> None:
        """Check that the server answers and accepts the key. Raises MissingBackend."""
        where = self._settings.base_url
        failures: tuple[type[Exception], ...] = (*_transport_errors(), EndpointError)
        try:
            status, _, data = self._once("GET", f"{where}/models", None)
        except failures as error:
            raise MissingBackend(
                f"guidance.endpoint: no server answers at {where}: {self._plain(error)}. Start the server, or correct "
                "base_url. guidance's backend `templates` needs no server"
            ) from None
        if status in (401, 403):
            refused = f"the key in {self._settings.key_env}" if self._key else "a request without a key (see key_env)"
            raise MissingBackend(f"guidance.endpoint: {where} refuses {refused}: {self._error_text(data)}")
        if urlsplit(where).hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("guidance: images and audio of every clip are sent to %s", where)

    def __call__(self, messages: Sequence[Message], schema: Mapping[str, Any] | None = None) -> Answer:
        """Answer the last message. schema: enforced where the server can. Raises EndpointError."""
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [_message(message) for message in messages],
            "temperature": 0,
            "seed": 0,
            "max_tokens": MAX_TOKENS,
        }
        if schema is not None:
            form = {"name": str(schema.get("title", "answer")), "strict": True, "schema": dict(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        # A field that the server does not know stays out of later requests. A field refused because this request is
        # too long does not: the next request may be shorter.
        refused, unknown = set(self._refused), set[str]()
        while True:
            status, data = self._post({name: value for name, value in body.items() if name not in refused})
            if status == 200:
                self._refused |= unknown
                return Answer(self._text(data))
            reason = self._error_text(data)
            optional = set(_OPTIONAL).intersection(body) - refused if status in (400, 422) else set()
            # where the server names no field, the newest one is the likeliest
            culprits = {name for name in optional if name in reason} or optional & {"response_format"}
            if not any(word in reason.lower() for word in ("context", "length", "too long")):
                unknown |= culprits
            if not culprits:
                raise EndpointError(f"{self._settings.base_url} answers {status}: {reason}")
            refused |= culprits

    def _post(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and content of the answer. A busy server is asked up to five times."""
        content = json.dumps(body).encode()
        for attempt in range(1, _TRIES + 1):
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                with self._slot():
                    status, headers, data = self._once("POST", f"{self._settings.base_url}/chat/completions", content)
            except _transport_errors() as error:
                why = self._plain(error)
            else:
                if status not in _BUSY:
                    return status, data
                why = f"{status}: {self._error_text(data)}"
                retry_after = re.fullmatch(r"\d{1,6}", headers.get("retry-after", "").strip())
                wait = min(_LONGEST_WAIT_S, float(retry_after[0])) if retry_after else wait
            if attempt < _TRIES:
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
                    f"{self._settings.base_url} redirects to {clean(where, 100)}. Redirects are not followed; correct "
                    "base_url"
                )
            for part in response.iter_bytes():
                data += part
                if len(data) > _MAX_ANSWER:
                    raise EndpointError(f"{self._settings.base_url} answers with more than {_MAX_ANSWER:,} bytes")
                # the client's own timeout holds between two reads only
                if time.monotonic() > until:
                    raise TimeoutError(f"no whole answer in {_ANSWER_S:g} s")
            return response.status_code, response.headers, bytes(data)

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """Hold one of `requests` slots. All workers of a run share them through lock files in the temporary folder."""
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
        """The text of the answer's first choice."""
        try:
            choice = json.loads(data)["choices"][0]
            message = choice["message"]
            content = message.get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise EndpointError(
                f"{self._settings.base_url} answers in another form than a chat's: {self._quoted(data)[:_MAX_QUOTE]}"
            ) from None
        if isinstance(content, list):  # of parts
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        if not isinstance(content, str) or not content.strip():
            why = message.get("refusal") or choice.get("finish_reason") or "no reason given"
            raise EndpointError(f"the model gives an empty answer: {self._quoted(str(why))}")
        return content

    def _error_text(self, data: bytes) -> str:
        """The server's error message in the content of an answer, or the content's start where it has none."""
        try:
            error = json.loads(data)
            error = error.get("error", error.get("detail", error))
            message = error.get("message") if isinstance(error, dict) else error
        except (ValueError, AttributeError, RecursionError):
            message = None
        return self._quoted(message if isinstance(message, str) else data[: 2 * _MAX_QUOTE])

    def _plain(self, error: Exception) -> str:
        return self._quoted(f"{type(error).__name__}: {error}")

    def _quoted(self, text: str | bytes) -> str:
        """Text from the server on one line, without the key: some servers repeat it."""
        decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return clean(decoded.replace(self._key, "***") if self._key else decoded, _MAX_QUOTE)


def _key(settings: EndpointSettings) -> str:
    if not settings.key_env:
        return ""
    key = os.environ.get(settings.key_env, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise MissingBackend(
            f"guidance.endpoint.key_env: the environment variable {settings.key_env} holds no key. Export it, or leave "
            "key_env out for a server that needs no key. guidance's backend `templates` needs no server"
        )
    return key


def _transport_errors() -> tuple[type[Exception], ...]:
    import httpx

    return (httpx.TransportError, httpx.DecodingError, httpx.InvalidURL, TimeoutError)


def _message(message: Message) -> dict[str, Any]:
    """A message in the endpoint's form."""
    if not message.images and message.sound is None:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_base64(_jpeg(image))}"}}
        for image in message.images
    ]
    if message.sound is not None:
        parts.append({"type": "input_audio", "input_audio": {"data": _base64(_wav(message.sound)), "format": "wav"}})
    return {"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}


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
