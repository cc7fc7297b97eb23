"""The run: setting up, the loop, the baseline and the summary."""
