"""Dense optical flow from frame to frame: the backends' contract, OpenCV's DIS flow, and RAFT."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import islice, pairwise
from typing import ClassVar

import numpy as np

from tasks.stages.backend import Backend, Resources
from tasks.weights import store as weights


class FlowBackend(Backend, ABC):
    """A backend of the stage: optical flow."""

    @abstractmethod
    def flows(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Compute the flow from each frame to the next.

        frames: [height, width, 3] uint8 RGB each. Yields: [height, width, 2] float32, x and y in pixels.
        """


class DisFlow(FlowBackend):
    """OpenCV's DIS flow, fast preset (Kroeger et al., Fast Optical Flow using Dense Inverse Search, ECCV 2016)."""

    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.1)

    def __init__(self) -> None:
        import cv2

        cv2.setNumThreads(1)  # the workers run in parallel, so each uses one thread
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    @classmethod
    def version(cls) -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    def flows(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        import cv2

        for first, second in pairwise(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in frames):
            yield self._dis.calc(first, second, None)  # type: ignore[call-overload]


class RaftFlow(FlowBackend):
    """RAFT, large, 12 iterations (tasks.networks.raft)."""

    networks: ClassVar[tuple[str, ...]] = ("raft",)
    resources: ClassVar[Resources] = Resources(gpu=0.25, memory_gb=1.1, batch=8)
    """Memory by the size of its weights, not measured: the catalogue's 0.02 GB in float32, in which it computes, and an
    allowance of 1 GB for libraries and activations. A pair of frames takes 60 MB at 320x180."""

    def __init__(self) -> None:
        from tasks.networks import raft

        self._network = raft.load()

    @classmethod
    def version(cls) -> str:
        import cv2

        # OpenCV estimates the camera's movement (tasks.stages.motion.stage).
        return f"raft {weights.digest('raft')}, torch {version('torch')}, opencv {cv2.__version__}"

    def flows(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        import torch

        from tasks.networks import raft

        rest = iter(frames)
        last = list(islice(rest, 1))
        while batch := list(islice(rest, self.resources.batch)):
            images = torch.from_numpy(np.stack([*last, *batch])).permute(0, 3, 1, 2)
            last = batch[-1:]
            yield from raft.flows(self._network, images).permute(0, 2, 3, 1).numpy()


BACKENDS: dict[str, type[FlowBackend]] = {"dis": DisFlow, "raft": RaftFlow}
