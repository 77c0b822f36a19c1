"""Grounded heads that see drafted tokens too: what they saw already is frozen, what the new inputs add is trained.

Behind a path of drafted tokens t₁ … the logits of head k are P · (h + SiLU(W [h ; e(root)] + b + Σ V_j e(t_j))), for the tokens
that head k proposes without any: its shortlist. With V at zero that is the head as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medusa_deploy.runtime.drafting.draft import TokenPath
from medusa_deploy.runtime.files.heads import HeadSet

_BATCH = 512


class FrozenHeads:
    """Grounded heads of one block over rows of the backbone's output weight, as torch tensors."""

    def __init__(self, heads: HeadSet, embedding: Any, output_weight: Any) -> None:
        import torch

        assert heads.config.kind == "grounded" and heads.config.num_layers == 1 and heads.token_map is not None
        self.count = heads.config.num_heads
        self.embedding = embedding
        self.token_map = torch.from_numpy(heads.token_map)
        self.projection = output_weight[self.token_map].contiguous()
        self._blocks = [[torch.from_numpy(part).float() for part in heads.layer(head, 0)] for head in range(self.count)]

    def before(self, head: int, hidden: Any, roots: Any) -> Any:
        """What the head's block puts through SiLU without a path, float32 [n, H]."""
        import torch

        weight, bias = self._blocks[head]
        return torch.nn.functional.linear(torch.cat([hidden.float(), self.embedding[roots]], -1), weight, bias)

    def shortlist(self, hidden: Any, roots: Any, size: int) -> tuple[Any, Any]:
        """Draft indices int64 and log-probabilities float32 [n, K, size], best first."""
        import torch

        parts = []
        with torch.no_grad():
            for rows in torch.arange(len(roots)).split(1024):
                state = hidden[rows].float()
                inside = [self.before(head, state, roots[rows]) for head in range(self.count)]
                x = state[:, None] + torch.nn.functional.silu(torch.stack(inside, 1))  # [n, K, H]
                parts.append((x @ self.projection.T).log_softmax(-1).topk(size, -1))
        return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


@dataclass(frozen=True, slots=True)
class Schedule:
    """Of training new inputs."""

    epochs: int = 3
    learning_rate: float = 2e-3
    dropout: float = 0.4
    seed: int = 0


def train_inputs(
    heads: FrozenHeads, head: int, seen: Sequence[int], examples: Any, shortlist: Any, schedule: Schedule
) -> tuple[np.ndarray, float]:
    """V float32 [H, len(seen) · H] of one head, and the mean loss of the last epoch.

    ``seen``: which of the tokens after the root it sees, from 0; ``shortlist`` int64 [n, R]: its draft indices. The loss is that
    of choosing among these, and the label where it isn't one of them.
    """
    import torch
    from torch.nn import functional

    from medusa_deploy.calibration.training.examples import draft_indices, draft_labels, root_mean_square

    labels = draft_labels(examples.labels[:, head], draft_indices(heads.token_map, len(heads.embedding)))
    usable = ((labels >= 0) & (examples.labels[:, list(seen)] >= 0).all(1)).nonzero()[:, 0]
    # Inputs of unit size, as in calibration/training/trainable.py.
    size = root_mean_square(heads.embedding[torch.unique(examples.roots)])
    unit = heads.embedding / size
    weight = torch.zeros(unit.shape[1], len(seen) * unit.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=schedule.learning_rate, weight_decay=0.01)
    batch = min(_BATCH, len(usable))
    steps = len(usable) // batch
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=steps * schedule.epochs + 1, pct_start=0.1
    )
    loss_sum = 0.0
    for epoch in range(schedule.epochs):
        torch.manual_seed(schedule.seed * 1000 + epoch)
        order = usable[torch.randperm(len(usable))]
        loss_sum = 0.0
        for rows in order[: steps * batch].split(batch):
            state, label = examples.hidden[rows].float(), labels[rows, None]
            path = torch.cat([unit[examples.labels[rows, place]] for place in seen], -1)
            added = functional.linear(functional.dropout(path, schedule.dropout), weight)
            x = state + functional.silu(heads.before(head, state, examples.roots[rows]) + added)
            choices = torch.cat([shortlist[rows], label], 1)
            logits = torch.einsum("nrh,nh->nr", heads.projection[choices], x)
            found = choices[:, :-1] == label
            known = found.any(1)
            logits = logits.masked_fill(torch.cat([torch.zeros_like(found), known[:, None]], 1), -torch.inf)
            loss = functional.cross_entropy(logits, torch.where(known, found.int().argmax(1), found.shape[1]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rate.step()
            loss_sum += float(loss.detach())
    return (weight.detach() / size.repeat(len(seen))).numpy(), loss_sum / steps


class PathHeads:
    """Heads with new inputs at the positions of examples: a :class:`.replay.Proposer`. Heads without any are as they were."""

    def __init__(
        self, heads: FrozenHeads, inputs: Sequence[tuple[Sequence[int], np.ndarray] | None], examples: Any, size: int, top_k: int
    ) -> None:
        """``inputs``: of each head, the tokens that it sees and V. ``size``: of the shortlists."""
        import torch

        self._top_k, self._seen = top_k, [() if given is None else tuple(given[0]) for given in inputs]
        indices, log_probs = heads.shortlist(examples.hidden, examples.roots, size)
        self._indices, self._log_probs = indices.numpy(), log_probs.numpy()
        self._tokens = heads.token_map[indices].numpy()
        self._mass = log_probs.logsumexp(-1).numpy()
        self._hidden, self._projection = examples.hidden.float().numpy(), heads.projection.numpy()
        self._draft = {int(token): index for index, token in enumerate(heads.token_map.tolist())}
        self._before: list[np.ndarray | None] = [None] * len(inputs)
        # Of each head and token that it sees: what every token of the draft vocabulary adds, float32 [V', H].
        self._added: list[list[np.ndarray]] = [[] for _ in inputs]
        for head, given in enumerate(inputs):
            if given is None:
                continue
            parts = torch.arange(len(examples.roots)).split(4096)
            with torch.no_grad():
                whole = [heads.before(head, examples.hidden[rows], examples.roots[rows]).numpy() for rows in parts]
            self._before[head] = np.concatenate(whole)
            embedded = heads.embedding[heads.token_map].numpy()
            self._added[head] = [embedded @ part.T for part in np.split(given[1], len(given[0]), 1)]

    def candidates(self, position: int, path: TokenPath) -> tuple[list[int], list[float]]:
        """The ``top_k`` best of the shortlist behind ``path``; none behind a token that no head can propose."""
        head = len(path)
        tokens, before = self._tokens[position, head], self._before[head]
        if before is None:
            return tokens[: self._top_k].tolist(), self._log_probs[position, head, : self._top_k].tolist()
        if any(path[place] not in self._draft for place in self._seen[head]):
            return [], []
        inside = before[position].copy()
        for place, added in zip(self._seen[head], self._added[head], strict=True):
            inside += added[self._draft[path[place]]]
        x = self._hidden[position] + inside / (1 + np.exp(-inside))
        logits = self._projection[self._indices[position, head]] @ x
        # The shortlist keeps the probability that it had as a whole.
        log_probs = logits - np.logaddexp.reduce(logits) + self._mass[position, head]
        best = np.argsort(-log_probs, kind="stable")[: self._top_k]
        return tokens[best].tolist(), log_probs[best].tolist()
