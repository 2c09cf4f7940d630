"""Speed, memory and size of a student beside its teacher, baselines and what counting allows."""
