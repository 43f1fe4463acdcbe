"""Names the presets of layers that an adapter changes; `targets_of` says which layers these are."""

PRESETS = ("attention", "transformer", "all")
