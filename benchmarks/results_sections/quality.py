"""Sections about what is emitted: exactness, heads, and what fewer bits change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .markdown import MIB, change, heads_records, link, rate, report, share, signed, table

_VERIFIED = {
    "verify-prompts-1-50": "SmolLM2, grounded heads, prompts 1 to 50",
    "verify-prompts-51-100": "SmolLM2, grounded heads, prompts 51 to 100",
    "verify-medusa-2": "SmolLM2, Medusa-2",
    "verify-medusa": "SmolLM2, heads of the paper's form",
    "verify-qwen2.5-coder-0.5b": "Qwen2.5-Coder 0.5B, grounded heads",
}
_TOGETHER = "verify-slots-fp32"
_PAST_WINDOWS = "long-prompts-gemma-3-270m"


def exactness() -> str:
    """Speculative against plain decoding, token for token, and both against transformers."""
    reports = {name: report(name) for name in _VERIFIED}
    counts = []
    for name, label in _VERIFIED.items():
        trees, reference = reports[name]["trees"].values(), reports[name].get("reference")
        compared, found = (sum(tree[key] for tree in trees) for key in ("tokens_compared", "divergences"))
        against = f"{reference['divergences']} in {reference['tokens_compared']}" if reference else "not compared"
        counts.append((link(name, label), str(reports[name]["prompts"]), str(compared), str(found), against))
    ways = next(iter(reports.values()))["trees"]
    lengths = [
        (
            way,
            str(entry["rows"] or "chosen"),
            *(
                f"{found['trees'][way]['mean_acceptance_length']:.3f}" if way in found["trees"] else "–"
                for found in reports.values()
            ),
        )
        for way, entry in ways.items()
    ]
    together = report(_TOGETHER)
    each = [
        (
            way.removeprefix("together, "),
            *(str(entry[key]) for key in ("tokens_compared", "divergences")),
            f"{entry['mean_acceptance_length']:.3f}",
        )
        for way, entry in together["trees"].items()
        if way.startswith("together, ")
    ]
    return f"""## Exactness

`medusa-deploy verify` compares every way of drafting with plain decoding, token for token,
{reports["verify-medusa"]["max_new_tokens"]} tokens a held-out prompt, fp32. Transformers' own greedy answers are compared with
plain decoding:

{table(("", "prompts", "tokens compared", "divergences", "divergences from transformers"), counts)}

The ways and their mean acceptance lengths, in the same order of reports:

{table(("way", "rows", *_VERIFIED.values()), lengths)}

{together["prompts"]} prompts decoded together in {together["slots"]} slots, in random order, against each alone, plainly
({link(_TOGETHER)}); the two ways of the table gave {together["trees"]["automatic"]["divergences"]} and
{together["trees"]["best-rows"]["divergences"]} divergences alone:

{table(("together", "tokens compared", "divergences", "mean acceptance length"), each)}

{_past_windows()}"""


def _past_windows() -> str:
    """Tokens of a model with windows behind prompts that are longer, against transformers' eager attention."""
    found = report(_PAST_WINDOWS)
    prompts = found["prompts"]
    return f"""Gemma 3 270M, whose layers see {found["check"]["cpu"]["windows"][0]} tokens at most, behind prompts of
{", ".join(str(each["prompt"]) for each in prompts)} tokens ({link(_PAST_WINDOWS)}): {sum(each["wrong"] for each in prompts)} of
{sum(each["tokens"] for each in prompts)} tokens differ from those of transformers' eager attention. Logits differ by
{found["check"]["cpu"]["max_logit_error"]:.2g} at most, where the largest is {found["check"]["cpu"]["logit_scale"]:.1f}."""


_HEADS = {"medusa": "paper's form", "grounded": "grounded", "medusa-2": "Medusa-2"}
_TRAINED = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct",
    "qwen2.5-coder-0.5b-instruct": "Qwen2.5-Coder-0.5B-Instruct",
    "qwen2.5-coder-1.5b-instruct": "Qwen2.5-Coder-1.5B-Instruct",
}


def heads() -> str:
    """Hit rates of the committed heads, and what Medusa-2 does to the backbone."""
    records = {name: heads_records(folder) for folder, name in _TRAINED.items()}
    links = [f"[{name}](../heads/{folder}/README.md)" for folder, name in _TRAINED.items() if records[name]]
    tuned = [_tuned(name, found["medusa-2"]) for name, found in records.items() if "medusa-2" in found]
    header = ("model", "tokens of answers", "head", *(f"{name}: top-1 / top-5" for name in _HEADS.values()))
    grounded, second = report("smollm2-grounded"), report("smollm2-medusa-2")
    first_lengths = [grounded[key]["mean_acceptance_length"] for key in ("medusa", "heads_only")]
    second_lengths = [second[key]["mean_acceptance_length"] for key in ("medusa", "heads_only")]
    return f"""## Heads

How often a head's best candidate is right, and one of its 5 best, on answers to held-out prompts. How the heads were made:
{", ".join(links)}.

{table(header, _hit_rates(records), texts=6)}

Medusa-2 moves perplexities:

{table(("", "own held-out answers", "held-out prose"), tuned)}

That buys SmolLM2 little: {second_lengths[0]:.2f} tokens a step instead of {first_lengths[0]:.2f} with prompt lookup,
{second_lengths[1]:.2f} instead of {first_lengths[1]:.2f} without. The speed-ups
[above](#medusa-beside-plain-decoding) are of minutes in which the machine read memory at different speeds. All that was learnt,
with an earlier lookup, accepted 2.32 tokens a step instead of 2.1, at +10.7 % perplexity
([the second stage and its budget](notes/heads.md#the-second-stage-and-its-budget))."""


def _hit_rates(records: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for model, found in records.items():
        for head in range(max((each["num_heads"] for each in found.values()), default=0)):
            cells = []
            for form in _HEADS:
                rates = found[form]["hit_rates"]["heldout"][head] if form in found else []
                cells.append(f"{rate(rates[0])} / {rate(sum(rates[:5]))}" if rates else "–")
            yield model, f"{found['grounded']['tokens']['train']:,}", str(head + 1), *cells


def _tuned(model: str, found: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after = (found["quality"][key] for key in ("backbone", "tuned"))
    answers = "the backbone's own answers"
    return model, f"{before[answers]:.3f} to {after[answers]:.3f}", f"{before['prose']:.1f} to {after['prose']:.1f}"


def path_heads() -> str:
    """Heads that see the drafted tokens before theirs."""
    found = report("path-heads")
    kinds, header = found["kinds"], ("", *found["kinds"])

    def listed(key: str, kind: Mapping[str, Any]) -> str:
        return " ".join(rate(value) for value in kind[key][1:])

    rows = [
        ("top-1 of heads 2, 3, 4 where those before were right", *(listed("top_1", kind) for kind in kinds.values())),
        ("first candidates of 2, 3, 4 heads all right", *(listed("top_1_of_whole_paths", kind) for kind in kinds.values())),
    ]
    for way, name in (("heads", "heads alone"), ("heads_and_lookup", "with lookup")):
        for count in ("4", "6", "8", "16"):
            cells = [(kind[way][count]["tokens_per_step"], kind[way][count]["speedup"]) for kind in kinds.values()]
            rows.append((f"{name}, {count} rows", *(f"{tokens:.3f}, {speedup:.2f}×" for tokens, speedup in cells)))
    return f"""## Heads that see what was drafted

Tokens a step and speed-up, replayed on {found["tokens"]["heldout"]:,} tokens of held-out answers with measured costs of steps
({link("path-heads")}, by `benchmarks/path_heads.py`). The price of the new inputs isn't in it
([what came of it](notes/heads.md#heads-that-see-what-was-drafted)):

{table(header, rows)}"""


def eight_bits() -> str:
    """What ``compare`` says of the variant in 8 bits."""
    found = report("compare-int8")
    answers, prose, exact = found["answers"], found["prose"], found["exactness"]
    lengths = [found["acceptance"][side]["mean_acceptance_length"] for side in "ab"]
    sizes = [found["size"][side]["weights_bytes"] for side in "ab"]
    kl = [part["kl_nats"]["mean"] for part in (answers, prose)]
    greedy, common = found["greedy"], found["greedy"]["common_prefix"]["mean"]
    interval = [100 * (bound - 1) for bound in found["acceptance"]["ratio_95"]]
    rows = [
        ("weights that the graph reads", f"{sizes[1] / MIB:.0f} of {sizes[0] / MIB:.0f} MiB"),
        ("perplexity of fp32's own answers", change(answers["perplexity"]["increase_percent"])),
        ("perplexity of held-out prose", change(prose["perplexity"]["increase_percent"])),
        ("mean KL from fp32, on answers and on prose", f"{kl[0]:.4f} and {kl[1]:.4f} nats"),
        (
            "same likeliest token, on answers and on prose",
            " and ".join(f"{share(part['argmax_agreement']['share'])} of {part['positions']}" for part in (answers, prose)),
        ),
        (
            "greedy answers equal over all tokens",
            f"{greedy['identical']} of {greedy['answers']}; all agree for {common:.0f} tokens on average",
        ),
        (
            f"mean acceptance length, {found['rows']} rows",
            signed(
                f"{lengths[1]:.3f}, fp32 {lengths[0]:.3f} ({100 * (found['acceptance']['ratio'] - 1):+.1f} %, "
                f"95 % interval {interval[0]:+.1f} to {interval[1]:+.1f})"
            ),
        ),
        ("divergences of its speculative from its plain decoding that its noise doesn't explain", str(exact["b"]["unexplained"])),
    ]
    return f"""## Weights in 8 bits

`cpu-int8` against fp32, by `compare`, {found["prompts"]} held-out prompts, at most {found["max_new_tokens"]} new tokens
({link("compare-int8")}; [what it means](quantisation.md)):

{table(("", "cpu-int8"), rows, texts=2)}"""


def four_bits() -> str:
    """What ``quantise --bits 4 --budget`` chose."""
    found = report("quantise-int4")
    products = found["products"]
    return f"""## Weights in 4 bits

`quantise --bits 4 --budget {found["budget"]}` ({link("quantise-int4")}) gave {products["4"]} of {sum(products.values())} products
4 bits and {products["8"]} 8 bits. Weights went from {found["bytes_before"] / MIB:.0f} to {found["bytes_after"] / MIB:.0f} MiB.
The mean KL of next-token distributions over {found["positions"]} positions is {found["divergence"]:.4f} nats."""


# Report's key → what was asked for, and who did it.
_ACTIVATIONS = {
    "ours-w8a8": ("default", "ours"),
    "ours-w8a8-down": ("down products kept", "ours"),
    "modelopt-smoothquant-down": ("`INT8_SMOOTHQUANT_CFG`, down products kept", "modelopt"),
    "ours-w8a8-all": ("nothing kept", "ours"),
    "ort-static-down": ("`quantize_static`, outputs and down products left", "onnxruntime"),
    "modelopt-smoothquant": ("`INT8_SMOOTHQUANT_CFG`", "modelopt"),
    "ort-static": ("`quantize_static`, outputs of products left", "onnxruntime"),
}
_WEIGHTS = {
    "ours-4-bit": ("smoothed, GPTQ", "ours"),
    "ours-4-bit-nearest": ("smoothed, to the nearest", "ours"),
    "ort-4-bit-hqq": ("HQQ", "onnxruntime"),
    "modelopt-awq": ("`INT4_AWQ_CFG`, 8 texts", "modelopt"),
    "ort-4-bit-rtn": ("to the nearest", "onnxruntime"),
    "ort-4-bit-k-quant": ("k-quant", "onnxruntime"),
    "modelopt-4-bit": ("`INT4_BLOCKWISE_WEIGHT_ONLY_CFG`", "modelopt"),
}


def _judged(systems: Mapping[str, Any], named: Mapping[str, tuple[str, str]]) -> Iterable[tuple[str, ...]]:
    for key in sorted(named.keys() & systems.keys(), key=lambda key: systems[key]["kl_nats"]):
        found = systems[key]
        yield (
            *named[key],
            str(found["products"]),
            change(found["perplexity_increase_percent"]),
            f"{found['kl_nats']:.4f} ± {found['kl_error']:.4f}",
            share(found["argmax_agreement"]),
        )


def libraries() -> str:
    """Libraries' quantisation beside ours."""
    blocks = {found["settings"]["block"]: found for found in (report("quantisers"), report("quantisers-blocks-of-64"))}
    header = ("", "by", "products", "perplexity", "KL, nats", "same argmax")
    settings = blocks[32]["settings"]
    tables = [("Weights and activations in 8 bits", _ACTIVATIONS, 32)]
    tables += [(f"Weights in 4 bits, blocks of {block}", _WEIGHTS, block) for block in blocks]
    shown = "\n\n".join(
        f"{name}:\n\n{table(header, _judged(blocks[block]['systems'], named), texts=2)}" for name, named, block in tables
    )
    return f"""## Quantisation beside libraries

Each system had the same {settings["calibration"]["texts"]} training prompts and answers. All were judged on the same
{settings["judged"]["texts"]} held-out answers ({settings["judged"]["tokens"]:,} positions;
[how](../benchmarks/README.md#quantiserspy-libraries-quantisation-beside-ours), {link("quantisers")},
{link("quantisers-blocks-of-64", "of blocks of 64")}). The projection and heads stay in fp32. In 4 bits ours multiplies queries,
keys and values as one product, so it has fewer products. [What the tables mean](quantisation.md#beside-libraries).

{shown}"""
