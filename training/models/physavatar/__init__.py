"""The parts of physavatar: Wan2.1-VACE, its control video, and the loss of the physical state."""
