"""Other ways to make a model smaller, to compare with."""
