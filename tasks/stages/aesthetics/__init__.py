"""The stage `aesthetics`: technical quality and aesthetics of the frames."""
