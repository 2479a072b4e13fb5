"""The methods of `fastpost train`, for messages that have to be there before torch is imported."""

METHODS = {
    "none": "the plain step",
    "sam": "SAM",
    "sam_lm": "SAM, rho 0.15, ascent on a quarter of the accumulation window",
    "asam": "adaptive SAM, rho 0.5",
    "r3f": "R3F",
    "r4f": "R3F with a spectrally normalised head, for classifiers",
    "sam+r3f": "both",
    "gap": "gradient ascent on one text",
}
