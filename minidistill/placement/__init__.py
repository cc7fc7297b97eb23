"""Where each part of a run is, and whether it fits."""
