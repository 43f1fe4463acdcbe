"""Names the ways to keep networks off the device that they run on."""

MODES = ("none", "idle", "sequential")
