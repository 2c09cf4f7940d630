"""Plan: which layer uses whose attention, by rules that need no model."""
