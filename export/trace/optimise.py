"""Cleans a traced graph that has no weights: folds constants, applies onnxscript's rules, removes unused nodes.

Does what ``onnxscript.optimizer.optimize_ir`` does, with two differences. It leaves out rules for operators that a decoder
hasn't got (convolutions, batch norms). It leaves out ``slice_split_rule``, which compares every slice with all nodes of the
graph: that rule takes 31 of the 36 CPU seconds of all rules on 32 layers, and it finds nothing there.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

_RULES = (
    rules.mul_by_1_rule, rules.add_0_rule, rules.sub_0_rule, rules.div_by_1_rule, rules.dropout_zero_rule,
    rules.dropout_inference_rule, rules.two_reshapes_matmul_reshape_rule, rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule, rules.cast_constant_of_shape_without_value_rule, rules.collapse_slice_rule,
    rules.collapse_slice2_rule, rules.materialize_reshape_shape_rule, rules.min_min_rule, rules.min_max_rule, rules.max_max_rule,
    rules.max_min_rule, rules.cast_cast_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule, rules.no_op_transpose_rule, rules.transpose_transpose_rule, rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule, rules.no_op_dynamic_scatter_nd_rule, rules.no_op_static_scatter_nd_rule,
)  # fmt: skip
_ROUNDS = 2


def optimise(model: ir.Model, should_fold: Callable[[ir.Node], bool | None]) -> None:
    """Optimise in place. ``should_fold`` says if a node may be folded; None leaves the decision to onnxscript."""
    passes.InlinePass()(model)
    clean = ir.passes.Sequential(
        rewriter.RewritePass(_RULES),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
    )
    for _ in range(_ROUNDS):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
        clean(model)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
