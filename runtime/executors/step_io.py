"""Names of the step graph's inputs and outputs, and the layout of cache rows. Export writes them, executors bind them.

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
columns        int64 [T]          0 … T-1: its length says how much of the caches this step reads
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

The *CPU* graphs, of ONNX Runtime's own operators, read these instead of ancestors, forced, write_index, columns and commit. What
they hold follows from those, and costs the host less than the graph (:mod:`.cpu_inputs`). Several rows want R = N and one forced
row, or R = 1 and all rows forced.

======================= ================== ===================================================================
input, CPU graphs       shape              meaning
======================= ================== ===================================================================
mask                    [B, 1, N, T]       added to attention scores: 0, or ``HIDDEN_BIAS`` where a row mustn't look
last_rows               int32 [B]          cache row of the step's last row
visible                 int32 []           T
parents                 int64 [B, N]       row whose logits say what a row should carry; 0 where it doesn't matter
paths                   float32 [B, N, R]  1 where row n isn't forced and is on the path to the row of logits r, else 0
heads_wanted            bool []            whether the heads run
logits_wanted           bool []            whether logits are needed but for the greedy choice, which seldom takes all of them
======================= ================== ===================================================================

The *device* graph is the same step closed over itself: what the next step needs are outputs, so that an engine can start it
before the host has read this one. It has no ``commit``. Accepted rows are carried from step to step outside the caches, and a
cache is never read before it is written. ``P``: rows of the step before.

======================= ================== ===================================================================
input, device graph     shape              meaning
======================= ================== ===================================================================
kept                    int64 [B, K]       rows of the step before that were accepted below its root, left-aligned
kept_count              int64 [B]          how many: they go to write_index-kept_count … write_index-1
draft_slots             int64 [B, N]       head·k + rank of the candidate that fills each row of the next step; 0 for the root
carried_key.{l}         [B, H_kv, P, D_h]  new keys of the step before, carried_value.{l} likewise
======================= ================== ===================================================================

======================= ================== ===================================================================
output, device graph    shape              meaning
======================= ================== ===================================================================
emitted                 int64 [B, K+1]     accepted tokens, then the next root, then -1
next_tokens             int64 [B, N]       the next step on the same tree: its tokens,
next_positions          int64 [B, N]       its positions,
next_write_index        int64 [B]          its write index (this one + the number of emitted tokens),
next_kept               int64 [B, K]       what it must keep,
next_kept_count         int64 [B]          and how many; after a prefill these don't count: all its rows are in place
new_key.{l}             [B, H_kv, N, D_h]  this step's own keys, new_value.{l} likewise: carried to the next step
======================= ================== ===================================================================

The scatter of the device graph always writes K + N rows from write_index-kept_count on: up to K rows past the step's own are
overwritten, which no row sees and :func:`cache_rows` has room for.

The first ``K`` cache rows are a margin that is never visible: with it ``write_index - K`` can't be negative, so the rows
accepted in the previous step and the rows of this one are written by one scatter (the commit is deferred by a step).
"""

from __future__ import annotations

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
HEADS_WANTED = "heads_wanted"
LOGITS_WANTED = "logits_wanted"
KEPT = "kept"
KEPT_COUNT = "kept_count"
DRAFT_SLOTS = "draft_slots"
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
"""What the device graph adds to the outputs, caches and carried rows apart."""

STEP_INPUTS = (TOKENS, POSITIONS, ANCESTORS, FORCED, WRITE_INDEX, COLUMNS, LOGIT_ROWS, COMMIT)
"""Small inputs of the standard graph."""

CPU_INPUTS = (MASK, LAST_ROWS, VISIBLE, PARENTS, PATHS)
"""What the host works out for CPU graphs."""

# The most negative finite fp16 number: masks are additive and finite, so a fully hidden row can't become NaN.
HIDDEN_BIAS = -65504.0

CACHE_ALIGNMENT = 8


def past_names(layers: int) -> list[str]:
    """Cache inputs in graph order: key and value of layer 0, then of layer 1 …"""
    return _of_each_layer("past", layers)


def present_names(layers: int) -> list[str]:
    """Cache outputs in the same order; each is the memory of the input at the same index."""
    return _of_each_layer("present", layers)


def carried_names(layers: int) -> list[str]:
    """Inputs of the device graph in the same order: the rows that the step before wrote."""
    return _of_each_layer("carried", layers)


def new_names(layers: int) -> list[str]:
    """Outputs of the device graph in the same order: the rows that this step wrote."""
    return _of_each_layer("new", layers)


def _of_each_layer(name: str, layers: int) -> list[str]:
    return [f"{name}_{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]


def cache_rows(capacity: int, heads: int, max_rows: int) -> int:
    """Rows ``S`` of a cache that holds ``capacity`` tokens: the margin before them, the widest tree after them.

    Behind that, ``heads`` rows more: the device graph's scatter is always that much longer than the step.
    """
    rows = 2 * heads + capacity + max_rows
    return -(-rows // CACHE_ALIGNMENT) * CACHE_ALIGNMENT
