"""`ddil-ray demo`."""


def demo() -> None:
    """x."""
