"""Media files: opening, decoding, bringing frames upright, encoding; and a clip as the stages see it."""
