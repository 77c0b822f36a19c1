"""medusa-deploy itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .base import Answer, Peer, Settings


@dataclass(slots=True)
class Ours(Peer):
    """A bundle through the public API: plainly, or ``speculative`` with its heads and, unless ``lookup`` is false, prompt lookup.

    ``variant``: which of the bundle's graphs runs; None takes the fastest that is exact.
    """

    module: ClassVar[str] = "medusa_deploy"
    roots: ClassVar[tuple[str, ...]] = ("medusa-deploy[cpu]", "numpy", "onnxruntime", "tokenizers", "minijinja")
    speculative: bool = False
    lookup: bool | None = None
    variant: str | None = None
    settings: Settings = field(init=False)
    session: Any = field(init=False)

    def load(self, settings: Settings) -> None:
        """Load the bundle, hashes checked."""
        from medusa_deploy.runtime import load

        self.settings = settings
        options = {"threads": settings.threads, "variant": self.variant, "slots": settings.slots}
        self.session = load(settings.path, **options, prefix_cache=False)
        if self.speculative and self.session.tree.rows == 1:
            raise ValueError("the bundle has no heads: there is nothing to speculate with")

    def _request(self, token_ids: list[int], max_new_tokens: int) -> Any:
        from medusa_deploy.runtime.request import Request, Rows
        from medusa_deploy.runtime.tree import ROOT_ONLY

        drafting = Rows(lookup=self.lookup) if self.speculative else ROOT_ONLY
        return Request(
            token_ids=token_ids, max_new_tokens=max_new_tokens, ignore_eos=self.settings.ignore_eos, drafting=drafting
        )

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate from ids."""
        done = self.session.submit(self._request(token_ids, max_new_tokens)).result()
        return Answer(done.token_ids, done.stats.prefill_seconds, done.stats.steps)

    def run_many(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Queue all prompts; the session takes as many as it has slots."""
        answers: list[list[int]] = [[] for _ in prompts]
        for index, done in self.session.generate_many(self._request(prompt, max_new_tokens) for prompt in prompts):
            if done.error is not None:
                raise done.error
            answers[index] = done.token_ids
        return answers

    @staticmethod
    def encode(path: str, prompts: str | None, count: int | None) -> dict[str, Any]:
        """Prompts as token ids, through the bundle's tokenizer and chat template."""
        from medusa_deploy.runtime import load
        from medusa_deploy.runtime.files.bundle import sha256
        from medusa_deploy.runtime.files.manifest import MANIFEST_NAME
        from medusa_deploy.tools.prompt_source import prompts_for

        session = load(path, check_hashes=False, prefix_cache=False)
        return {
            "prompts": prompts_for(session, None if prompts is None else Path(prompts), count),
            "eos_token_ids": sorted(session.manifest.text.eos_token_ids),
            "manifest_sha256": sha256(session.bundle.path(MANIFEST_NAME)),
        }
