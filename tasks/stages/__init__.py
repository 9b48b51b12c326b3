"""The measuring stages: what each measures of a clip, and by which backends."""
