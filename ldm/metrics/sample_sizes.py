"""The sample sizes that are required to claim a difference between models."""

MIN_SEEDS = 3  # with two seeds, the interval is ± 12.7 standard errors
MIN_IMAGES = 100  # with fewer, a share has a standard error of more than 5 points
