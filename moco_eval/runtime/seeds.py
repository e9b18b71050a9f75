"""Seeds of torch's generator that hang on nothing but what is drawn."""

import numpy as np


def seed_of(seed: int, number: int, part: int = 0) -> int:
    """What torch's generator is seeded with: 0 for the weights that are drawn, i + 1 for a part of iteration i."""
    return int(np.random.SeedSequence([seed, 4, number, part]).generate_state(1)[0])
