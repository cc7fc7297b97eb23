"""Evaluations and the scoreboard."""
