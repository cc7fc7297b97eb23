"""Rollouts: sampled, scored and given advantages."""
