"""active-mind's network: a diffusion transformer of three branches."""
