"""Distill: losses, trainer, adapters and stored teachers."""
