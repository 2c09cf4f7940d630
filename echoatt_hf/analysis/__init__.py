"""Analyze: how similarly the layers of a model attend."""
