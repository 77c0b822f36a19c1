"""Fixtures of the soak tests."""

from support.soaking import amount as amount, figures as figures, speaking_bundle as speaking_bundle  # noqa: PLC0414
