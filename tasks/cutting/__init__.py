"""From a source to its clips: probe the file, find its shots, plan the clips, write them."""
