"""The stage `identity`: faces, speakers and the main face of a clip."""
