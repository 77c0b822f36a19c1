"""Quantise an F32 GGUF file with llama.cpp's own quantiser.

Usage: ``python -m peer.few_bits IN.gguf OUT.gguf q8_0|q4_k_m``, with ``benchmarks`` in PYTHONPATH
"""

from __future__ import annotations

import sys
from pathlib import Path


def quantise_gguf(source: Path, output: Path, kind: str) -> None:
    """Write ``source`` in few bits, with llama.cpp's defaults for ``kind``.

    Raises:
        ValueError: llama.cpp refused.
    """
    import llama_cpp

    types = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = types[kind]
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), options)
    if status:
        raise ValueError(f"{source}: llama.cpp's quantiser ended with status {status}")


if __name__ == "__main__":
    quantise_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
