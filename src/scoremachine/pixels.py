"""The former place of `scoremachine.data.decoding`, for programs that import it from here."""

from scoremachine.data.decoding import (
    Refused,
    check_sides,
    decoded,
    is_gray,
    to_pixels,
)

__all__ = ["Refused", "check_sides", "decoded", "is_gray", "to_pixels"]
