"""The values that settings may have: the largest ones, and the names of modes."""

from ldm.execution import offload_modes

OFFLOAD_MODES = offload_modes.MODES
MAX_PIXELS = 2**25  # maximum of an image: 5792x5792
MAX_COUNT = 2**20
MAX_NUMBER = 1e30  # NaN and infinity are not below it
