"""Servers that run a student: vLLM and the one of transformers."""
