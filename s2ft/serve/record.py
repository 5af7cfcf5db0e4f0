"""What the access log and the counters need to know of a request."""

import time
from dataclasses import dataclass, field

RECORD = "s2ft_record"  # key in the ASGI scope


@dataclass
class Record:
    """What is known of a request at its end.

    Attributes:
        id: The id that the client sent, or a new one.
        model: The base or the adapter that answers, or None if the request names no model that is served.
        prompt_tokens: Tokens of the prompts.
        generated_tokens: Tokens of the answers.
        status: The HTTP status. It differs from that of the headers if a stream fails.
        started: When the request arrived, in time.perf_counter().
    """

    id: str
    model: str | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    status: int | None = None
    started: float = field(default_factory=time.perf_counter)


def record_of(scope) -> Record:
    """Return the record of a request by its ASGI scope."""
    return scope[RECORD]
