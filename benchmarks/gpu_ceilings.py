"""What does the device reach at best? A large copy and a large bf16 matrix product, which all floors are made of."""

from __future__ import annotations

from gpu_session import Session


def estimate(session: Session) -> float:
    """Gigabytes and teraflops: fractions of a second, and the first calls' start-up."""
    return 0.0 if session.tiny else 4.0


def run(session: Session) -> None:
    """Measured by the session, which the other stages ask too."""
    print(f"ceilings: {session.ceilings}", flush=True)
