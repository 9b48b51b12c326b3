"""The stage `motion`: speed of the camera and of the subject."""
