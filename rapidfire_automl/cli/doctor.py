def doctor() -> None:
    """Stub."""
