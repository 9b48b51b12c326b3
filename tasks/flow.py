"""Dense optical flow from frame to frame: the protocol of a backend, the one that OpenCV brings, and RAFT."""

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import islice, pairwise
from typing import ClassVar, Protocol

import numpy as np

from tasks import weights

_PAIRS = 8  # pairs of frames that RAFT is given at a time, some 60 MB each at 320x180


class Flow(Protocol):
    """An optical flow backend."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def flows(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Flow from each frame to the next.

        frames: [height, width, 3] uint8 RGB each. Yields: [height, width, 2] float32, x and y in pixels.
        """


class DisFlow:
    """OpenCV's DIS flow, fast preset (Kroeger et al., Fast Optical Flow using Dense Inverse Search, ECCV 2016)."""

    def __init__(self) -> None:
        import cv2

        # the workers are the parallelism
        cv2.setNumThreads(1)
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    @staticmethod
    def version() -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    @staticmethod
    def check() -> None:
        """OpenCV is always installed."""

    def flows(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        import cv2

        for first, second in pairwise(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in frames):
            yield self._dis.calc(first, second, None)  # type: ignore[call-overload]


class RaftFlow:
    """RAFT, large, 12 iterations (tasks.networks.raft)."""

    networks: ClassVar[tuple[str, ...]] = ("raft",)

    def __init__(self) -> None:
        from tasks.networks import raft

        self._network = raft.load()

    @staticmethod
    def version() -> str:
        import cv2

        # OpenCV's part is the camera's movement (tasks.motion)
        return f"raft {weights.digest('raft')}, torch {version('torch')}, opencv {cv2.__version__}"

    @staticmethod
    def check() -> None:
        weights.check("raft")

    def flows(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        import torch

        from tasks.networks import raft

        coming = iter(frames)
        last = list(islice(coming, 1))
        while group := list(islice(coming, _PAIRS)):
            images = torch.from_numpy(np.stack([*last, *group])).permute(0, 3, 1, 2)
            last = group[-1:]
            yield from raft.flows(self._network, images).permute(0, 2, 3, 1).numpy()


BACKENDS: dict[str, type[Flow]] = {"dis": DisFlow, "raft": RaftFlow}
