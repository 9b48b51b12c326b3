"""The stage `subtitles`: text in the frames, by kind."""
