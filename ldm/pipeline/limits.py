"""The largest values of settings."""

MAX_PIXELS = 2**25  # maximum of an image: 5792x5792
MAX_COUNT = 2**20
MAX_NUMBER = 1e30  # NaN and infinity are not below it
