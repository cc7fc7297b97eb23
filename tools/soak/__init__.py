"""Long tests of what a run survives: kills, hostile inputs, and starts that are stopped."""
