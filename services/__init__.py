"""The three services of the serving line, and what they share."""
