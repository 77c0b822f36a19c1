"""The systems that benchmarks/peers.py compares."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Peer
from .genai import OrtGenai
from .llama import LlamaCpp
from .ours import Ours
from .torch_sdpa import Transformers
from .vino import OpenVino


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table. ``format``: what it loads (a key of :func:`.convert.conversion`, or ``model`` or ``bundle``).

    ``precision``: of its weights. ``several``: whether it answers several prompts at a time.
    """

    label: str
    peer: Peer
    format: str
    install: str
    precision: str = "fp32"
    several: bool = True


_OURS = "pip install 'medusa-deploy[cpu]'"
_LLAMA = "pip install llama-cpp-python"
_GENAI = "pip install onnxruntime-genai"
_VINO = "pip install openvino-genai"
_TORCH = "pip install transformers torch"
_EIGHT, _FOUR = "8 bits", "4 bits"

SYSTEMS = {
    "llama.cpp": System("llama.cpp (llama-cpp-python)", LlamaCpp(), "gguf", _LLAMA),
    "llama.cpp-lookup": System("llama.cpp, prompt lookup", LlamaCpp(lookup=True), "gguf", _LLAMA, several=False),
    "llama.cpp-f32-cache": System("llama.cpp, fp32 cache", LlamaCpp(f32_cache=True), "gguf", _LLAMA),
    "onnxruntime-genai": System("onnxruntime-genai", OrtGenai(), "onnxruntime-genai", _GENAI),
    "onnxruntime-genai-lookup": System(
        "onnxruntime-genai, prompt lookup", OrtGenai(lookup=True), "onnxruntime-genai", _GENAI, several=False
    ),
    "transformers": System("transformers (sdpa)", Transformers(), "model", _TORCH, several=False),
    "transformers-lookup": System("transformers, prompt lookup", Transformers(lookup=True), "model", _TORCH, several=False),
    "openvino-genai": System("openvino-genai", OpenVino(), "openvino", _VINO),
    "openvino-genai-lookup": System("openvino-genai, prompt lookup", OpenVino(lookup=True), "openvino", _VINO, several=False),
    "ours-plain": System("medusa-deploy, plain", Ours(), "bundle", _OURS),
    "ours-heads": System("medusa-deploy, Medusa without lookup", Ours(speculative=True, lookup=False), "bundle", _OURS),
    "ours-medusa": System("medusa-deploy, Medusa", Ours(speculative=True), "bundle", _OURS),
}
# Weights in few bits; the bundle has the variants that `medusa-deploy quantise` made of it.
SYSTEMS |= {
    "llama.cpp-q8_0": System("llama.cpp, Q8_0", LlamaCpp(), "gguf-q8_0", _LLAMA, _EIGHT),
    "llama.cpp-q8_0-lookup": System(
        "llama.cpp, Q8_0, prompt lookup", LlamaCpp(lookup=True), "gguf-q8_0", _LLAMA, _EIGHT, several=False
    ),
    "llama.cpp-q4_k_m": System("llama.cpp, Q4_K_M", LlamaCpp(), "gguf-q4_k_m", _LLAMA, _FOUR),
    "onnxruntime-genai-int8": System("onnxruntime-genai, int8", OrtGenai(), "onnxruntime-genai-int8", _GENAI, _EIGHT),
    "onnxruntime-genai-int8-lookup": System(
        "onnxruntime-genai, int8, prompt lookup", OrtGenai(lookup=True), "onnxruntime-genai-int8", _GENAI, _EIGHT, several=False
    ),
    "openvino-genai-int8": System("openvino-genai, int8", OpenVino(fp32=False), "openvino-int8", _VINO, _EIGHT),
    "openvino-genai-int8-lookup": System(
        "openvino-genai, int8, prompt lookup", OpenVino(fp32=False, lookup=True), "openvino-int8", _VINO, _EIGHT, several=False
    ),
    "ours-int8-plain": System("medusa-deploy int8, plain", Ours(variant="cpu-int8"), "bundle", _OURS, _EIGHT),
    "ours-int8-heads": System(
        "medusa-deploy int8, Medusa without lookup", Ours(True, False, "cpu-int8"), "bundle", _OURS, _EIGHT
    ),
    "ours-int8-medusa": System("medusa-deploy int8, Medusa", Ours(True, variant="cpu-int8"), "bundle", _OURS, _EIGHT),
    "ours-int4-plain": System("medusa-deploy int4, plain", Ours(variant="cpu-int4"), "bundle", _OURS, _FOUR),
    "ours-int4-medusa": System("medusa-deploy int4, Medusa", Ours(True, variant="cpu-int4"), "bundle", _OURS, _FOUR),
}
# One prompt at a time, in fp32: each engine with and without the speculation that it brings.
ONE = tuple(name for name, system in SYSTEMS.items() if system.precision == "fp32" and name != "llama.cpp-f32-cache")
# Several at a time, in fp32 and 8 bits.
SEVERAL = tuple(
    name
    for name, system in SYSTEMS.items()
    if system.several and system.precision != _FOUR and name not in ("llama.cpp-f32-cache", "ours-heads", "ours-int8-heads")
)
