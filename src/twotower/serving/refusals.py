"""Write error bodies and their texts, the same for refusals of the protocol, of the middleware and of the routes."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json


def error_body(code: str, message: str, request_id: str, location: Any = None) -> bytes:
    """Return the standard error body as JSON."""
    error = {"code": code, "message": message} | ({} if location is None else {"location": location})
    return to_json({"error": error, "request_id": request_id})


def too_large(most_bytes: int) -> str:
    """Return the message for a body that is too large."""
    return f"The request body is too large: at most {most_bytes:,} bytes are allowed. Send less at once."
