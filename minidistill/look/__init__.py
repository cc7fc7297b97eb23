"""Looking at what was trained: asking it, evaluating it, reading its rollouts."""
