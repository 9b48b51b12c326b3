"""The stage `crop`: the part of the picture that training sees, and the sound in sync with it."""
