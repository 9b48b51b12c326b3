"""The stage `pose`: physical states of body, face and hands."""
