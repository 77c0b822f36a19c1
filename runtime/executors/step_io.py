"""Names the step graph's inputs and outputs, and lays out cache rows. Export writes these names, executors bind them.

Dimensions: ``B`` slots, ``N`` rows of this step, ``R`` rows whose logits are needed, ``T`` visible cache rows, ``S`` cache
rows, ``K`` heads, ``k`` candidates a head, ``H`` hidden size, ``V`` vocabulary.

============== ================== ============================================================================
input          shape              meaning
============== ================== ============================================================================
tokens         int64 [B, N]       row 0 is the root (the newest emitted token); prefill rows form a chain
positions      int64 [B, N]       committed length + depth
ancestors      bool [B, N, N]     [b, i, j]: row j is row i or an ancestor of it; a row that isn't its own ancestor is padding
forced         int64 [B]          rows accepted unconditionally: 1 in decode (the root), N in prefill, 0 in an idle slot
write_index    int64 [B]          cache row of row 0
columns        int64 [T]          0 … T-1: its length is the number of cache rows that this step reads
logit_rows     int64 [B, R]       rows whose logits are computed: all N in verify, the last one in prefill
commit         int64 [B, K]       cache rows that are copied to write_index-K … write_index-1 before anything else is read
past_key.{l}   [B, H_kv, S, D_h]  preallocated; the output present_key.{l} is the same memory
============== ================== ============================================================================

============= ================= =====================================================
output        shape             meaning
============= ================= =====================================================
last_row      int64 [B]         the deepest accepted row
next_token    int64 [B]         argmax of the logits at that row: the next root
candidates    int64 [B, K, k]   the heads' top-k token ids at that row, best first
log_probs     float32 [B, K, k] their log-probabilities
logits        [B, R, V]         optional: for sampling on the host
hidden        [B, R, H]         optional: the backbone's normalised last hidden state
============= ================= =====================================================

**The cache.** Its first ``K`` rows are a margin that no row sees. Example: K = 2 heads, 5 committed tokens, a step of 4 rows on
the tree of :mod:`..tree`::

    cache row     0    1    2    3    4    5    6    7    8    9   10   11 … S-1
                ┌─────────┬────────────────────────┬───────────────────┬──────────┐
                │ margin  │ committed rows         │ root  a    b    c │ room     │
                └─────────┴────────────────────────┴───────────────────┴──────────┘
    seen by       nobody    every row of the step   self, descendants  nobody
                                                     ▲ write_index = K + committed = 7

The step accepts c, whose path is root, a, c. Three tokens are committed, and the next write_index is 10. Row 7 is in place; the
rows of a and c must become rows 8 and 9. The next step does that before it reads anything: its ``commit`` is [8, 10], and it
copies rows 8 and 10 to write_index-K … write_index-1, that is to 8 and 9. Rejected rows are overwritten or hidden, never zeroed.
The margin keeps ``write_index - K`` from being negative: one scatter writes the rows accepted in the step before and the rows of
this one (the commit is deferred by a step).

**Acceptance.** A row matches if it is forced or carries its parent's argmax. It is alive if it and all its ancestors match: one
product of ``ancestors`` with the mismatches. A padding row is never alive. The deepest row that is alive wins: the score is the
number of its ancestors, itself included::

            ancestors      mismatch   blocked    alive   score
    root    1  0  0  0        0          0        yes      1
    a       1  1  0  0   ·    0     =    0        yes      2
    b       1  0  1  0        1          1        no       0
    c       1  1  0  1        0          0        yes      3   ◀ argmax: last_row = 3

The *CPU* graphs consist of ONNX Runtime's own operators. They read these inputs instead of ancestors, forced, write_index,
columns and commit. The host computes them from those at less cost than the graph would (:mod:`.cpu_inputs`). A step of several
rows has R = N and one forced row, or R = 1 and all rows forced.

======================= ================== ===================================================================
input, CPU graphs       shape              meaning
======================= ================== ===================================================================
mask                    [B, 1, N, T]       added to attention scores: 0, or ``HIDDEN_BIAS`` if the row mustn't see the cache row
mask.{w}                [B, 1, N, T]       the same for layers with a window of w tokens, which hides positions <= the row's − w
last_rows               int32 [B]          cache row of the step's last row
visible                 int32 []           T
parents                 int64 [B, N]       row whose argmax a row should carry; 0 for a row that needs no match
paths                   float32 [B, N, R]  1 if row n isn't forced and lies on the path to the row of logits r, else 0
heads_wanted            bool []            true if the heads run
logits_wanted           bool []            true if more than the greedy choice needs logits; that choice seldom takes all of them
======================= ================== ===================================================================

A graph has the masks that its layers read: no ``mask`` where all of them have a window.

The *packed* CPU graphs step n slots at once. Their rows follow each other in one sequence: B is 1, N counts the rows of all
slots, and R those of them that get logits. Numbers in ``logit_rows`` and ``last_row`` count all rows; ``parents`` and the last
axis of ``paths`` count those with logits. Inputs that a slot's attention reads exist once a slot, as ``NAME@i`` for the i-th slot
of the step: masks, last_rows, visible, and the caches, which may have other sizes from slot to slot. ``last_row``,
``next_token``, ``candidates`` and ``log_probs`` have n entries.

======================= ================== ===================================================================
input, packed graphs    shape              meaning
======================= ================== ===================================================================
rows_of_slot            int64 [n]          rows of each slot; at least one
own_rows                float32 [n, R]     0 for the slot's own rows with logits, ``OTHERS_ROW`` for those of other slots
======================= ================== ===================================================================

The *device* graph is the same step, closed over itself: it outputs the inputs of the next step, so that an engine can start that
step before the host has read this one. It has no ``commit``. Accepted rows are carried from step to step outside the caches, and
no step reads a cache before it writes it. ``P``: rows of the step before.

======================= ================== ===================================================================
input, device graph     shape              meaning
======================= ================== ===================================================================
kept                    int64 [B, K]       rows of the step before that were accepted below its root, left-aligned
kept_count              int64 [B]          their number; they go to write_index-kept_count … write_index-1
draft_slots             int64 [B, N]       head·k + rank of the candidate that fills each row of the next step; 0 for the root
carried_key.{l}         [B, H_kv, P, D_h]  new keys of the step before, carried_value.{l} likewise
head_rows               int64 [W]          0, once or not at all: without rows the heads cost nothing (bundles of 0.1 and newer)
======================= ================== ===================================================================

======================= ================== ===================================================================
output, device graph    shape              meaning
======================= ================== ===================================================================
candidates, log_probs   [B, K·W, k]        the heads' results; empty without ``head_rows``
state_sum               float32 [B]        sum of the hidden state at the accepted row: NaN where it is, heads or not
emitted                 int64 [B, K+1]     accepted tokens, then the next root, then -1
next_tokens             int64 [B, N]       tokens of the next step on the same tree
next_positions          int64 [B, N]       positions of the next step
next_write_index        int64 [B]          write_index of the next step: this one + the number of emitted tokens
next_kept               int64 [B, K]       kept of the next step; meaningless after a prefill, whose rows are all in place
next_kept_count         int64 [B]          kept_count of the next step; meaningless after a prefill
new_key.{l}             [B, H_kv, N, D_h]  this step's own keys, new_value.{l} likewise: carried to the next step
======================= ================== ===================================================================

The scatter of the device graph always writes K + N rows from write_index-kept_count on. It overwrites up to K rows past the
step's own: no row sees them, and :func:`cache_rows` has room for them.
"""

from __future__ import annotations

from collections.abc import Iterable

TOKENS = "tokens"
POSITIONS = "positions"
ANCESTORS = "ancestors"
FORCED = "forced"
WRITE_INDEX = "write_index"
COLUMNS = "columns"
LOGIT_ROWS = "logit_rows"
COMMIT = "commit"
MASK = "mask"
LAST_ROWS = "last_rows"
VISIBLE = "visible"
PARENTS = "parents"
PATHS = "paths"
ROWS_OF_SLOT = "rows_of_slot"
OWN_ROWS = "own_rows"
HEADS_WANTED = "heads_wanted"
LOGITS_WANTED = "logits_wanted"
KEPT = "kept"
KEPT_COUNT = "kept_count"
DRAFT_SLOTS = "draft_slots"
HEAD_ROWS = "head_rows"
STATE_SUM = "state_sum"
ROOT_HIDDEN = "hidden"
ROOT_TOKEN = "root"

LAST_ROW = "last_row"
NEXT_TOKEN = "next_token"
CANDIDATES = "candidates"
LOG_PROBS = "log_probs"
LOGITS = "logits"
HIDDEN = "hidden"
EMITTED = "emitted"
NEXT_TOKENS = "next_tokens"
NEXT_POSITIONS = "next_positions"
NEXT_WRITE_INDEX = "next_write_index"
NEXT_KEPT = "next_kept"
NEXT_KEPT_COUNT = "next_kept_count"
CLOSING = (EMITTED, NEXT_TOKENS, NEXT_POSITIONS, NEXT_WRITE_INDEX, NEXT_KEPT, NEXT_KEPT_COUNT)
"""Outputs that the device graph adds, besides caches and carried rows."""

STEP_INPUTS = (TOKENS, POSITIONS, ANCESTORS, FORCED, WRITE_INDEX, COLUMNS, LOGIT_ROWS, COMMIT)
"""Small inputs of the standard graph."""

CPU_INPUTS = (LAST_ROWS, VISIBLE, PARENTS, PATHS)
"""Inputs of the CPU graphs that the host computes, besides masks."""

# The most negative finite fp16 number. Masks are additive and finite: a row that sees nothing can't become NaN.
HIDDEN_BIAS = -65504.0

OTHERS_ROW = -1e9
"""Added to the scores of rows of other slots: below what any mismatches of a slot's own rows add up to."""

PACKED_SLOTS = (2, 4, 8, 16)
"""Numbers of slots that packed graphs exist for."""

CACHE_ALIGNMENT = 8


def mask_name(window: int | None) -> str:
    """Name the mask of layers with a window of so many tokens; None: without one."""
    return MASK if window is None else f"{MASK}.{window}"


def mask_windows(inputs: Iterable[str]) -> dict[str, int | None]:
    """Find the masks among the names of a graph's inputs, each with its window."""
    named = {name: name.removeprefix(f"{MASK}.") for name in inputs if name == MASK or name.startswith(f"{MASK}.")}
    return {name: None if name == MASK else int(window) for name, window in named.items()}


def of_slot(name: str, index: int) -> str:
    """Name an input or output of a packed graph that exists once a slot, for the slot at ``index`` of the step."""
    return f"{name}@{index}"


def past_names(layers: int) -> list[str]:
    """Names the cache inputs in graph order: key and value of layer 0, then of layer 1 …"""
    return _of_each_layer("past", layers)


def present_names(layers: int) -> list[str]:
    """Names the cache outputs in the same order. Each shares the memory of the input at its index."""
    return _of_each_layer("present", layers)


def carried_names(layers: int) -> list[str]:
    """Names inputs of the device graph in the same order: the rows that the step before wrote."""
    return _of_each_layer("carried", layers)


def new_names(layers: int) -> list[str]:
    """Names outputs of the device graph in the same order: the rows that this step wrote."""
    return _of_each_layer("new", layers)


def _of_each_layer(name: str, layers: int) -> list[str]:
    return [f"{name}_{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]


def cache_rows(capacity: int, heads: int, max_rows: int) -> int:
    """Returns the rows S of a cache for ``capacity`` tokens: margin K + capacity + widest tree + K, rounded up.

    The last K = ``heads`` rows are for the device graph's scatter, which is always that much longer than the step.
    """
    rows = 2 * heads + capacity + max_rows
    return -(-rows // CACHE_ALIGNMENT) * CACHE_ALIGNMENT
