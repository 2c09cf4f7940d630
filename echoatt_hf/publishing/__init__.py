"""Publish: the model card, checks, and one commit on the Hub."""
