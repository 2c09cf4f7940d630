"""Convert: teacher and plan to student, and its closed-form start."""
