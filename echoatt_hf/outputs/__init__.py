"""What a run leaves behind: files that are written whole or not at all."""
