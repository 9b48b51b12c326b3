"""Fixtures that all tests share."""

import os

# Two test processes on two cores: with more threads each, they wait for each other. The libraries look when imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_manifests.storage import Storage
from tasks.media.clip import SAMPLE_RATE, ClipRecord
from tasks.synthetic import Truth, make
from tests.golden import WRITE


@dataclass(frozen=True)
class S3:
    """A server of the S3 API on this machine. The environment points to it, so that `s3://bucket/...` works."""

    endpoint: str
    bucket: str

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        running = S3(f"http://{host}:{port}", "footage")
        Storage(running.address).fs.mkdir(running.bucket)
        yield running
    server.stop()


@pytest.fixture
def s3_folder(s3: S3) -> str:
    """The address of an empty folder in the object store. Each test has its own."""
    return f"{s3.address}/{secrets.token_hex(8)}"


MakeClip = Callable[..., ClipRecord]


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> MakeClip:
    """Writes a small clip into a storage, as cutting does: a video of 64 x 48 at 25 frames a second, and an audio file.

    Returns the clip's record.
    """
    import av
    import soundfile

    made = tmp_path_factory.mktemp("clip")

    def media(frames: int, fps: int) -> tuple[Path, Path]:
        video, audio = made / f"{frames}-{fps}.mp4", made / f"{frames}-{fps}.flac"
        if not video.exists():
            with av.open(str(video), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
                stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "threads": "1"})
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for k in range(frames):
                    image = np.full((48, 64, 3), (k * 7) % 255, np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode())
            noise = np.random.default_rng(0).normal(0, 0.1, round(frames * SAMPLE_RATE / fps))
            soundfile.write(audio, noise.astype(np.float32), SAMPLE_RATE, subtype="PCM_16")
        return video, audio

    def make(
        storage: Storage, source_id: str = "0123456789abcdef", start_ms: int = 0, frames: int = 25, sound: bool = True
    ) -> ClipRecord:
        fps = 25
        clip_id = f"{source_id}-{start_ms:08d}-0badcafe"
        name = f"clips/{source_id[:2]}/{clip_id}"
        video, audio = media(frames, fps)
        if sound:
            storage.write_bytes(f"{name}.flac", audio.read_bytes())
        storage.write_bytes(f"{name}.mp4", video.read_bytes())
        start = start_ms / 1000
        return ClipRecord(
            clip_id=clip_id,
            source_id=source_id,
            start_s=start,
            end_s=start + frames / fps,
            fps=fps,
            frames=frames,
            width=64,
            height=48,
            video=f"{name}.mp4",
            audio=f"{name}.flac" if sound else "",
            metadata={"caption": "une dame à la fenêtre", "licence note": "CC-BY"},
        )

    return make


@dataclass(frozen=True)
class World:
    """Generated footage. Each file is made on first use and shared by all processes of the test session."""

    folder: Path
    known: dict[str, Truth] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        self.truth(name)
        return self.folder / name

    def truth(self, name: str) -> Truth:
        if name not in self.known:
            (self.known[name],) = make(self.folder, [name])
        return self.known[name]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Generated footage with known truth, by file name. `tasks.synthetic.catalogue()` lists the names."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world"
    folder.mkdir(exist_ok=True)
    return World(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="Write the records in tests/golden anew.")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-golden"):
        os.environ[WRITE] = "1"  # the processes that pytest-xdist starts inherit it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest-xdist, all tests of a file run in one process. All tests of the flows do so, too, since they
    share the same runs."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "flows" if nodeid.startswith("tests/flows/") else nodeid.partition("::")[0]

    return ByFile(config, log)
