"""The stage `people`: whether anybody is in the frame, and how the person is framed."""
