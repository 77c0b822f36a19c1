"""Runs the speculative loop without the host: a fixed tree's next inputs are made on the device from its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ....runtime.tree import Shape, Tree
from .step import Inputs, Outputs, TorchStep
from .weights import Heads


class Loop:
    """Steps of one tree over all slots. :meth:`advance` may be captured: it reads and writes the same tensors every time.

    ``emitted`` int64 [B, K+1] holds the tokens of the newest step, then -1. Without heads the drafted rows keep their tokens.
    A tree without drafted rows decodes plainly: nothing is ever moved.
    """

    def __init__(self, step: TorchStep, tree: Tree, visible: int, heads: Heads | None = None) -> None:
        self.step, self.tree, self.visible, self.heads = step, tree, visible, heads
        device, slots, margin = step.weights.device, step.caches[0].shape[0], step.margin

        def table(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self._depths = table(tree.depths)
        self._first, self._last = (table(paths) for paths in _path_tables(tree, margin))
        top_k = heads.top_k if heads is not None else 0
        self._candidates = table(tree.slots[0] * top_k + tree.ranks[1:]) if tree.rows > 1 else None
        zeros = torch.zeros(slots, tree.rows, dtype=torch.int64, device=device)
        self.inputs = Inputs(
            tokens=zeros.clone(),
            positions=zeros.clone(),
            ancestors=table(tree.ancestors)[None].repeat(slots, 1, 1),
            forced=torch.ones(slots, dtype=torch.int64, device=device),
            write_index=torch.full((slots,), margin, dtype=torch.int64, device=device),
            commit=torch.zeros(slots, margin, dtype=torch.int64, device=device) if tree.rows > 1 else None,
        )
        self.emitted = torch.full((slots, margin + 1), -1, dtype=torch.int64, device=device)

    def start(self, length: int, root: Tensor, candidates: Tensor | None = None) -> None:
        """Let every slot hold ``length`` committed rows and go on with ``root`` int64 [B]."""
        inputs, margin = self.inputs, self.step.margin
        inputs.tokens[:, 0] = root
        if candidates is not None and self._candidates is not None:
            inputs.tokens[:, 1:] = candidates.flatten(1)[:, self._candidates]
        inputs.positions.copy_((length + self._depths).expand_as(inputs.positions))
        inputs.write_index.fill_(margin + length)
        if inputs.commit is not None:
            inputs.commit.copy_(torch.arange(length, length + margin, device=root.device).expand_as(inputs.commit))

    def prefill(self, prompts: np.ndarray) -> Tensor:
        """Write prompts int64 [B, n] of one length into the slots and start behind them. Returns the first tokens [B]."""
        slots, rows = prompts.shape
        device, margin = self.inputs.tokens.device, self.step.margin
        full = torch.full((slots,), rows, dtype=torch.int64, device=device)
        chain = Inputs(
            tokens=torch.from_numpy(prompts).to(device),
            positions=torch.arange(rows, device=device).repeat(slots, 1),
            ancestors=torch.from_numpy(Shape.chain(rows).ancestors).to(device)[None].repeat(slots, 1, 1),
            forced=full,
            write_index=torch.full_like(full, margin),
            logit_rows=full[:, None] - 1,
        )
        outputs = self.step.run(chain, self.visible, self.heads)
        self.start(rows, outputs.next_token, outputs.candidates)
        return outputs.next_token

    def advance(self) -> Outputs:
        """Run one step, and write the inputs of the next one over this one's."""
        inputs, margin = self.inputs, self.step.margin
        outputs = self.step.run(inputs, self.visible, self.heads)
        depth = self._depths[outputs.last_row]  # [B]: accepted drafted tokens
        first = self._first[outputs.last_row]  # [B, K]: rows of the accepted path, then -1
        accepted = torch.where(first >= 0, inputs.tokens.gather(1, first.clamp(min=0)), -1)
        self.emitted[:, :margin] = accepted
        self.emitted[:, margin:] = -1
        self.emitted.scatter_(1, depth[:, None], outputs.next_token[:, None])
        following = inputs.write_index + 1 + depth
        if inputs.commit is not None:
            last = self._last[outputs.last_row]  # [B, K]: -1, then rows of the accepted path
            stay = following[:, None] + torch.arange(-margin, 0, device=last.device)
            inputs.commit.copy_(torch.where(last >= 0, inputs.write_index[:, None] + last, stay))
        inputs.write_index.copy_(following)
        inputs.positions.copy_((following - margin)[:, None] + self._depths)
        inputs.tokens[:, 0] = outputs.next_token
        if outputs.candidates is not None and self._candidates is not None:
            inputs.tokens[:, 1:] = outputs.candidates.flatten(1)[:, self._candidates]
        return outputs


def generate(loop: Loop, prompt: Sequence[int], count: int, advance: Callable[[], object] | None = None) -> tuple[list[int], int]:
    """Greedy tokens of one slot after ``prompt``, and the number of steps they took.

    ``advance`` is the loop's, captured; None takes it as it is.
    """
    advance = advance or loop.advance
    first = loop.prefill(np.asarray(prompt, np.int64)[None])
    tokens, steps = [int(first[0])], 0
    while len(tokens) < count:
        advance()
        tokens += [token for token in loop.emitted[0].tolist() if token >= 0]
        steps += 1
    return tokens[:count], steps


def _path_tables(tree: Tree, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Two tables int64 [N, K] of the rows on each row's path: aligned to the left, and to the right; -1 elsewhere."""
    left, right = (np.full((tree.rows, margin), -1, np.int64) for _ in range(2))
    for row, path in enumerate(tree.row_paths):
        left[row, : len(path)] = path
        right[row, margin - len(path) :] = path
    return left, right
