"""Makes variants of a bundle's graphs with weights in 8 or 4 bits, in the same bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.arguments import choice, flag, integer, number, optional_path, path, settings
from .moments import MOMENT_PROMPTS, measure_moments

if TYPE_CHECKING:
    import numpy as np

    from ...export.quantise.cpu import CpuPrecision, CpuReport, Made
    from ...runtime.files.bundle import Bundle
    from ...runtime.files.scales_file import Scales
    from ..console import Progress
    from ..measure.kl import Divergence

BITS = (4, 8, 32)
ROUNDINGS = ("gptq", "nearest")
BUDGET_PROMPTS, BUDGET_TOKENS = 6, 48


def quantise(
    bundle: Path | str,
    scales: Path | str | None = None,
    *,
    name: str | None = None,
    precision: CpuPrecision | None = None,
    budget: float | None = None,
    data: Path | str | None = None,
    samples: int | None = None,
    rounding: str = "gptq",
    threads: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Quantise the CPU graph of ``bundle`` and add it as the variant ``name`` (None: ``cpu-int8`` or ``cpu-int4``).

    ``scales`` is a file that ``calibrate`` wrote; its smoothing is applied. ``rounding`` of 4-bit weights is ``gptq`` or
    ``nearest``. For ``gptq``, ``samples`` prompts of ``data`` (None: the package's training prompts) are answered.

    ``budget`` is the most that the distributions of next tokens may diverge from the CPU graph's, as mean KL in nats. Products
    that spoil most get more bits until it is kept. Returns the report that the verb prints.

    Raises:
        BundleError, BundleBusyError, BundleExistsError: the bundle can't take the variant.
        ScalesError, ScalesMismatchError: the scales can't be used, or are another model's.
        QuantisationError: weights that can't be quantised, or a budget that can't be kept.
        CalibrationError, PromptError: the data won't do.
        UsageError: the name, bits or blocks.
        OutputError: the file system refused.
    """
    from ..extras import require

    require("calibrate")
    from ...export.passes.matmuls import find_matmuls
    from ...export.quantise.cpu import CpuPrecision, quantise_cpu
    from ...export.quantise.screen import load_whole
    from ...export.quantise.takers import with_takers
    from ...export.variant import add_variant
    from ...runtime.files.bundle import locked, open_bundle
    from ...runtime.files.scales_file import read_scales
    from ..console import Progress

    bundle, scales, data = path("bundle", bundle), optional_path("scales", scales), optional_path("data", data)
    precision = settings("precision", precision, CpuPrecision)
    name = f"cpu-int{precision.layers}" if name is None else name
    budget, samples = number("budget", budget, None), integer("samples", samples, MOMENT_PROMPTS)
    rounding = choice("rounding", rounding, ROUNDINGS, "gptq")
    threads, force = integer("threads", threads, None), flag("force", force)
    with locked(bundle), Progress("load") as bar:
        opened = open_bundle(bundle)
        _check(opened, name, precision, force=force)
        found = None if scales is None else with_takers(read_scales(scales, opened.manifest), opened)
        moments = None
        if precision.layers == 4 and rounding == "gptq":
            moments, _digest = measure_moments(opened, data, samples, threads, bar)
        measured: dict[str, Any] = {}
        made: Made = {}
        source = opened.path(opened.manifest.graph("cpu"))
        if budget is not None:
            search = _Search(opened, precision, found, moments, made, _divergence(opened, data, threads, bar), bar)
            kept, measured = search.run(budget)
            precision = replace(precision, kept=kept)
        model = load_whole(source)
        bar.phase("quantise", len(find_matmuls(model)))
        report = quantise_cpu(model, precision, found, moments, made, bar.update)
        bar.phase("write")
        facts = {
            "source": opened.manifest.files[opened.manifest.graph("cpu")].sha256,
            "scales": None if found is None else dict(found.provenance),
            **describe_variant(report, precision),
            **measured,
        }
        after = add_variant(opened, name, model, facts)
    return {"bundle": str(bundle), "variant": name, "file": after.manifest.variants[name], **facts}


def quantise_for_cuda(bundle: Path | str, *, force: bool = False) -> dict[str, Any]:
    """Add the variant ``cuda-int8`` to a bundle in fp16: weights in 8 bits, for the backend cuda. Returns the verb's report.

    Raises:
        BundleError, BundleBusyError, BundleExistsError: the bundle can't take the variant.
        QuantisationError: no weights that can be quantised.
        OutputError: the file system refused.
    """
    from ..extras import require

    require("calibrate")
    from ...export.quantise.cuda import NAME, write_cuda_variant
    from ...runtime.files.bundle import locked, open_bundle
    from ..console import Progress

    bundle, force = path("bundle", bundle), flag("force", force)
    with locked(bundle), Progress("quantise"):
        after, report = write_cuda_variant(open_bundle(bundle), force=force)
    return {
        "bundle": str(bundle),
        "variant": NAME,
        "file": after.manifest.variants[NAME],
        "products": {"8": report.products, "16": report.left},
        "bytes_before": report.before,
        "bytes_after": report.after,
    }


def _check(bundle: Bundle, name: str, precision: CpuPrecision, *, force: bool) -> None:
    from ...export.variant import check_variant
    from ...runtime.errors import QuantisationError, UsageError

    bundle.manifest.graph("cpu")
    check_variant(bundle.manifest, name, force=force)
    if bundle.manifest.dtype != "float32":
        raise QuantisationError(
            f"the bundle's graphs are in {bundle.manifest.dtype}, the CPU's kernels for few bits take float32",
            hint="export in fp32: medusa-deploy export … --dtype fp32",
        )
    if precision.layers == precision.projection == precision.heads == 32:
        raise UsageError("nothing is quantised with 32 bits everywhere", hint="give --bits 8 or 4")


def _divergence(bundle: Bundle, data: Path | None, threads: int | None, bar: Progress) -> Divergence:
    """Measure divergence on the last prompts of every category in the data: GPTQ sees the first ones."""
    from ...calibration.int8.samples import categories_in_turn
    from ...runtime.session import load
    from ...runtime.text.prompts import read_prompts
    from ..measure.kl import Divergence
    from ..prompt_source import packaged_prompts

    bar.phase("answers for the budget")
    session = load(bundle.folder, variant="cpu", threads=threads, check_hashes=False, prefix_cache=False)
    lines = categories_in_turn(read_prompts(data or packaged_prompts("train"))[::-1])[:BUDGET_PROMPTS]
    return Divergence(session, [session.encode(line.request()) for line in lines], BUDGET_TOKENS, threads)


class _Search:
    """Measures each product alone, then all of them with the choice that fits."""

    def __init__(
        self,
        bundle: Bundle,
        precision: CpuPrecision,
        scales: Scales | None,
        moments: Mapping[str, list[np.ndarray]] | None,
        made: Made,
        divergence: Divergence,
        bar: Progress,
    ) -> None:
        self._source = bundle.path(bundle.manifest.graph("cpu"))
        self._precision, self._scales, self._moments = precision, scales, moments
        self._made, self._divergence, self._bar = made, divergence, bar

    def run(self, budget: float) -> tuple[Mapping[str, int], dict[str, Any]]:
        """Find the products that keep more bits. Returns them and what was measured."""
        from ...export.passes.matmuls import find_matmuls
        from ...export.quantise.screen import load_whole
        from ..measure.quantise_budget import HIGHER, Sensitivity, fit_budget

        bits = self._precision.layers
        products = [product for product in find_matmuls(load_whole(self._source)) if product.layer is not None]
        self._bar.phase("products alone", len(products))
        found = {}
        for done, product in enumerate(products):
            size = product.shape[0] * product.shape[1] * (HIGHER[bits] - bits) // 8
            alone = replace(self._precision, layers=32, projection=32, heads=32, kept={product.name: bits})
            found[product.name] = Sensitivity(self._of(alone), size)
            self._bar.update(done + 1, f"{product.name}  {found[product.name].divergence:.2g} nats")
        self._bar.phase("the whole graph")
        choice = fit_budget(found, bits, budget, lambda kept: self._of(replace(self._precision, kept=kept)))
        worst = sorted(found.items(), key=lambda item: -item[1].divergence)[:20]
        return choice.kept, {
            "budget": budget,
            "divergence": choice.divergence,
            "positions": self._divergence.positions,
            "most_sensitive": {name: entry.divergence for name, entry in worst},
        }

    def _of(self, precision: CpuPrecision) -> float:
        from ...export.quantise.cpu import quantise_cpu
        from ...export.quantise.screen import load_whole

        model = load_whole(self._source)
        quantise_cpu(model, precision, self._scales, self._moments, self._made)
        return self._divergence.of(model)[0]


def describe_variant(report: CpuReport, precision: CpuPrecision) -> dict[str, Any]:
    """Return what the manifest keeps of a quantised graph."""
    from ...export.quantise.cpu import DEFAULT_BLOCKS

    counts = {str(bits): sum(1 for found in report.bits.values() if found == bits) for bits in BITS}
    return {
        "bits": {"layers": precision.layers, "projection": precision.projection, "heads": precision.heads},
        "blocks": {str(bits): precision.block or block for bits, block in DEFAULT_BLOCKS.items()},
        "projection_block": precision.projection_block,
        "rescored": precision.rescored,
        "products": counts,
        "kept": dict(precision.kept),
        "integers": len(report.integers),
        "smoothed": report.smoothed,
        "bytes_before": report.before,
        "bytes_after": report.after,
        "plain_step_bytes": report.plain,
    }
