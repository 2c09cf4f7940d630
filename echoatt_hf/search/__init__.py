"""Plans by their measured effect: many students are converted and the best one is kept."""
