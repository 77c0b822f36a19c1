"""The systems that benchmarks/peers.py compares, one class each: fp32, greedy, one sequence at a time."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy generation, an end-of-sequence token included. ``first_token_seconds``: from the start of the run.

    ``steps``: backbone passes after the prefill, where that isn't one a token.
    """

    token_ids: list[int]
    first_token_seconds: float | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What every system is loaded with. ``path``: the model in the system's own format. ``capacity``: prompt plus new tokens."""

    path: str
    threads: int
    capacity: int
    eos_token_ids: list[int]


class Peer(ABC):
    """A system under comparison: fp32, greedy, one sequence, a fixed number of threads."""

    module: ClassVar[str]
    roots: ClassVar[tuple[str, ...]]

    @abstractmethod
    def load(self, settings: Settings) -> None:
        """Make ready to run."""

    @abstractmethod
    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate greedily until an end-of-sequence token or ``max_new_tokens``; nothing is kept from earlier runs."""


class LlamaCpp(Peer):
    """llama.cpp through llama-cpp-python, from an F32 GGUF file."""

    module, roots = "llama_cpp", ("llama-cpp-python",)
    f32_cache: ClassVar[bool] = False

    def load(self, settings: Settings) -> None:
        """Load the GGUF file; the cache is llama.cpp's default (fp16) unless the class says otherwise."""
        from llama_cpp import GGML_TYPE_F32, Llama

        cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32} if self.f32_cache else {}
        threads = settings.threads
        self.model = Llama(
            settings.path, n_ctx=settings.capacity, n_threads=threads, n_threads_batch=threads, verbose=False, **cache
        )
        self.eos = frozenset(settings.eos_token_ids)

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate with the cache emptied first: it would reuse the prefix that chat prompts share."""
        self.model.reset()
        started, first, tokens = time.perf_counter(), None, []
        for token in self.model.generate(token_ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            tokens.append(int(token))
            first = first or time.perf_counter() - started
            if len(tokens) == max_new_tokens or token in self.eos:
                break
        return Answer(tokens, first)


class LlamaCppF32Cache(LlamaCpp):
    """The same with keys and values kept in fp32."""

    f32_cache = True


class OrtGenai(Peer):
    """onnxruntime-genai, from the folder that its model builder wrote."""

    module, roots = "onnxruntime_genai", ("onnxruntime-genai",)

    def load(self, settings: Settings) -> None:
        """Load the folder."""
        import onnxruntime_genai

        self.library = onnxruntime_genai
        config = onnxruntime_genai.Config(settings.path)
        options = {"intra_op_num_threads": settings.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}, "eos_token_id": settings.eos_token_ids}}))
        self.model = onnxruntime_genai.Model(config)

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate with a generator of its own."""
        started, first, tokens = time.perf_counter(), None, []
        params = self.library.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=len(token_ids) + max_new_tokens)
        generator = self.library.Generator(self.model, params)
        generator.append_tokens(token_ids)
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            first = first or time.perf_counter() - started
        return Answer(tokens, first)


class Transformers(Peer):
    """transformers with torch's scaled-dot-product attention."""

    module, roots = "transformers", ("transformers", "torch")

    def load(self, settings: Settings) -> None:
        """Load the folder in fp32."""
        import torch
        import transformers

        torch.set_num_threads(settings.threads)
        self.torch = torch
        self.eos = settings.eos_token_ids
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate with the default cache."""
        clock = _FirstToken()
        started = time.perf_counter()
        ids = self.torch.tensor([token_ids])
        output = self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.eos,
            pad_token_id=self.eos[0],
            streamer=clock,
        )
        return Answer(output[0, len(token_ids) :].tolist(), clock.at - started)


class _FirstToken:
    """A streamer that notes when the first token came; the first thing put is the prompt."""

    def __init__(self) -> None:
        self.puts, self.at = 0, 0.0

    def put(self, _: object) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


class OpenVino(Peer):
    """openvino-genai with weights, cache and arithmetic in fp32."""

    module, roots = "openvino_genai", ("openvino-genai",)

    def load(self, settings: Settings) -> None:
        """Load the folder; no blocks of the cache are kept from one prompt to the next."""
        import openvino_genai

        self.library = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.LLMPipeline(
            settings.path,
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=settings.threads,
            INFERENCE_PRECISION_HINT="f32",
            KV_CACHE_PRECISION="f32",
        )
        self.eos = settings.eos_token_ids

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate from ids; the library tells the time to the first token."""
        import numpy as np
        import openvino

        config = self.library.GenerationConfig()
        config.do_sample, config.max_new_tokens, config.apply_chat_template = False, max_new_tokens, False
        config.eos_token_id, config.stop_token_ids = self.eos[0], set(self.eos)
        ids = np.array([token_ids], np.int64)
        inputs = self.library.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        result = self.pipeline.generate(inputs, config)
        return Answer([int(token) for token in result.tokens[0]], result.perf_metrics.get_ttft().mean / 1000)


class OursPlain(Peer):
    """medusa-deploy, one token a step."""

    module, roots = "medusa_deploy", ("medusa-deploy[cpu]", "numpy", "onnxruntime", "tokenizers", "minijinja")
    speculative: ClassVar[bool] = False
    variant: ClassVar[str | None] = None

    def load(self, settings: Settings) -> None:
        """Load the bundle, hashes checked."""
        from medusa_deploy.runtime import load

        self.session = load(settings.path, threads=settings.threads, variant=self.variant, prefix_cache=False)
        if self.speculative and self.session.tree.rows == 1:
            raise ValueError("the bundle has no heads: there is nothing to speculate with")

    def run(self, token_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate through the public API."""
        done = self.session.generate(token_ids=token_ids, max_new_tokens=max_new_tokens, speculative=self.speculative)
        return Answer(done.token_ids, done.stats.prefill_seconds, done.stats.steps)

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


class OursMedusa(OursPlain):
    """medusa-deploy with the bundle's heads and tree."""

    speculative = True


class OursInt8Plain(OursPlain):
    """The bundle's variant cpu-int8."""

    variant = "cpu-int8"


class OursInt8Medusa(OursMedusa):
    """The bundle's variant cpu-int8."""

    variant = "cpu-int8"


class OursInt4Plain(OursPlain):
    """The bundle's variant cpu-int4."""

    variant = "cpu-int4"


class OursInt4Medusa(OursMedusa):
    """The bundle's variant cpu-int4."""

    variant = "cpu-int4"


PEERS: dict[str, type[Peer]] = {
    "llama.cpp": LlamaCpp,
    "llama.cpp-f32-cache": LlamaCppF32Cache,
    "onnxruntime-genai": OrtGenai,
    "transformers": Transformers,
    "openvino-genai": OpenVino,
    "ours-plain": OursPlain,
    "ours-medusa": OursMedusa,
    "llama.cpp-q8_0": LlamaCpp,
    "llama.cpp-q4_k_m": LlamaCpp,
    "ours-int8-plain": OursInt8Plain,
    "ours-int8-medusa": OursInt8Medusa,
    "ours-int4-plain": OursInt4Plain,
    "ours-int4-medusa": OursInt4Medusa,
}
