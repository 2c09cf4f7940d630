"""The steps in order, resumable."""
