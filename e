error: --kills is for `ldm bench faults`, and 1 or more, not 0 for scale
