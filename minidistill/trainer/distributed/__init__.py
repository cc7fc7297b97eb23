"""A trainer with several ranks."""
