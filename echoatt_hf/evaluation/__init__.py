"""Evaluate: held-out text, agreement with the teacher, zero-shot tasks."""
