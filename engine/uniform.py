"""The random numbers of sampling: keyed, so that no state is carried from token to token."""

_MASK = (1 << 64) - 1


def uniform_number(seed: int, position: int, choice: int = 0) -> float:
    """In [0, 1), from its arguments alone: rounds of splitmix64 (Steele et al. 2014)."""
    if choice:
        seed = _splitmix64((seed & _MASK) ^ _splitmix64(choice))
    state = _splitmix64((_splitmix64(seed & _MASK) + position) & _MASK)
    return (state >> 11) / float(1 << 53)


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
