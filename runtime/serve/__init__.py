"""A bundle behind HTTP, as OpenAI's clients expect it. Needs the extra ``serve``; nothing else in runtime imports it.

::

    limits.Gate (ids, keys, concurrency, log) ── app (routes) ── fields (what is asked) ── service (queue, health)
                                                      └─ answers + stream (what is said)         └─ AsyncSession
"""
