"""What takes a worker long to import. The process that workers are copies of imports this module once."""

import contextlib

import av  # noqa: F401
import cv2  # noqa: F401
import scenedetect  # noqa: F401
import soundfile  # noqa: F401

import tasks.execution.jobs
import tasks.execution.measure  # noqa: F401
from tasks.stages import mediapipe

with contextlib.suppress(Exception):  # a worker that needs it says what is wrong with it
    mediapipe.solution("holistic")
