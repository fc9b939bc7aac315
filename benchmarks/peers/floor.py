"""The least time of a pass under a bound on device memory, whatever an engine does."""


def floor_ms(
    plain_ms: float, bytes_to_visit: int, bound_bytes: int, bytes_a_second: float
) -> float:
    """max(plain time, (bytes that a pass visits - bound) / link rate), in milliseconds.

    Residents that fill the whole bound save no more than the bound, so what is left has to cross
    the link in every pass. It does not depend on which bytes an engine chose to keep.

    Example:
        >>> floor_ms(50.0, 16_000_000_000, 4_000_000_000, 50e9)
        240.0
    """
    return max(plain_ms, max(0, bytes_to_visit - bound_bytes) / bytes_a_second * 1e3)
