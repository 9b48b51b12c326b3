"""A chat endpoint in a process of its own: `python chat_server.py`. It prints its port.

The model's name in a request decides what the server does, well or badly. GET /log gives the requests since the last
GET /log, and clears the list.
"""

import base64
import io
import json
import re
import threading
import time
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

KEY = "secret-0123456789"
ANALYSIS = {
    "language": "English",
    "transcription": "never\nmind",
    "type": "singing",
    "emotion": "Calm.",
    "intention": "To test.",
}
PHRASES = """- **[AUDIO]**: warm tone; steady pace; soft volume.
- **[IMAGE]**: young woman; dark suit; plain wall
- **[VIDEO]**: gaze forward; gentle nods; calm smile"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/log":
            self.tell(200, {"requests": seen[:], "most": most[0]})
            seen.clear()
            most[0] = 0
        elif self.path == "/v1/models":
            allowed = self.headers.get("Authorization") in (None, f"Bearer {KEY}")
            self.tell(200 if allowed else 401, {"error": {"message": f"bad {self.headers.get('Authorization')}"}})
        else:
            seen.append({"path": self.path})
            self.tell(404, {})

    def do_POST(self) -> None:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        self.under_way = True
        try:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        finally:
            self.done()

    def done(self) -> None:
        """Count the request as finished. It is called before the end of the answer is sent, because the client may send
        its next request at once."""
        if getattr(self, "under_way", False):
            with lock:
                busy[0] -= 1
            self.under_way = False

    def answer(self, body: dict[str, Any]) -> None:
        model, messages = body["model"], body["messages"]
        first = messages[0]["content"]
        parts = [{"type": "text", "text": first}] if isinstance(first, str) else first
        texts = [part["text"] for part in parts if part["type"] == "text"]
        entry: dict[str, Any] = {
            "path": self.path,
            "model": model,
            "key": self.headers.get("Authorization", ""),
            "asks": sorted(set(body) - {"model", "messages"}),
            "roles": [message["role"] for message in messages],
            "text": texts[0],
            "pictures": [picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"],
            "seconds": [seconds(part["input_audio"]) for part in parts if part["type"] == "input_audio"],
        }
        with lock:
            seen.append(entry)
            times[model] = times.get(model, 0) + 1
        question, again = texts[0].split()[1], len(messages) > 1
        if model == "slow":
            self.done()  # the answer goes on after the client has given up
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(30):
                time.sleep(0.1)
                self.wfile.write(b" ")
                self.wfile.flush()
            self.close_connection = True
        elif model == "busy" and times[model] % 3:
            self.tell(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
        elif model == "down":
            self.tell(500, {"detail": f"out of order, {self.headers.get('Authorization')}"})
        elif model == "plain" and "response_format" in body:
            self.tell(400, {"error": {"message": "unknown field"}})
        elif model == "picky" and {"max_tokens", "temperature"} & set(body):
            self.tell(400, {"error": {"message": f"no {sorted({'max_tokens', 'temperature'} & set(body))[0]} here"}})
        elif model == "deaf" and entry["seconds"]:
            self.tell(400, {"error": {"message": "input_audio is not supported"}})
        elif model == "moved":
            self.tell(307, {}, {"Location": f"http://localhost:{self.server.server_address[1]}/elsewhere"})
        elif model == "huge":
            self.tell(200, {"filler": "x" * 5_000_000})
        elif model == "html":
            self.tell(200, "<html>welcome</html>")
        elif model == "silent":
            self.say(None, "content_filter")
        elif model == "refuses":
            self.say("I cannot help with that.")
        elif model == "careless" and not again:
            self.say("Sure! Here it is: {")
        elif model == "short" and question == "plan":
            self.say(json.dumps({"shots": [], "note": "ignored"}))
        else:
            time.sleep(0.05)
            self.say(good_answer(question, texts[0], fenced=model == "fenced"))

    def say(self, content: str | None, reason: str = "stop") -> None:
        self.tell(200, {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": reason}]})

    def tell(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.done()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: standard error belongs to the test."""


def good_answer(question: str, text: str, fenced: bool) -> str:
    """A good answer. question: the prompt's second word. text: the prompt. fenced: put it into a Markdown fence."""
    if question == "direct":
        return PHRASES
    segments = re.search(r"(\d+) segment", text)
    assert segments
    count = int(segments[1])
    if question == "analyse":
        answer = {**ANALYSIS, "segments": [{"content": f"Part {k}.", "intention": ""} for k in range(count)]}
    else:
        answer = {"shots": [{"expression": f"Smile {k}.", "action": f"Nod {k}."} for k in range(count)]}
    return f"```json\n{json.dumps(answer, indent=1)}\n```" if fenced else json.dumps(answer)


def picture(url: str) -> list[int]:
    """Width and height of a JPEG."""
    head, _, data = url.partition(",")
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == "JPEG"
    return list(image.size)


def seconds(audio: dict[str, str]) -> float:
    """Length of a WAV."""
    assert audio["format"] == "wav"
    with wave.open(io.BytesIO(base64.b64decode(audio["data"], validate=True))) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, 16_000)
        return sound.getnframes() / sound.getframerate()


if __name__ == "__main__":
    lock = threading.Lock()
    seen: list[dict[str, Any]] = []
    times: dict[str, int] = {}
    busy, most = [0], [0]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
