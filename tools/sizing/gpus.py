"""Lists GPUs as data, with the figures that NVIDIA publishes: nothing here was measured.

``source`` names the publication of a row's figures: ``wp`` an architecture's white paper, ``ds`` the product's data sheet. The
table was written down by hand, not generated from those documents: check a row against its source before money depends on it.
Rates of tensor cores are dense, fp16 with fp32 sums. A data sheet's figure "with sparsity" is halved, its fp8 figure quartered.
None: not published in this form.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model_sizes import look_up

# Targets that TensorRT-RTX 1.7 builds for without the GPU; the test of the adapter compares them.
AHEAD_OF_TIME = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. ``memory_gb``: as sold, ``shared`` with the CPU or not; ``bandwidth``: GB/s; ``fp16``: TFLOPS; ``int8``: TOPS."""

    name: str
    target: str
    memory_gb: int
    bandwidth: float
    fp16: float | None
    int8: float | None
    source: str
    shared: bool = False

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes. Takes a GB for 10⁹ bytes, to be on the safe side: ECC and the driver take a part of what is sold."""
        return self.memory_gb * 10**9


GPUS = (
    Gpu("RTX 3060 12GB", "sm_86", 12, 360, None, None, "ds"),
    Gpu("RTX 3060 Ti", "sm_86", 8, 448, None, None, "ds"),
    Gpu("RTX 3070", "sm_86", 8, 448, 40.6, 162.6, "wp"),
    Gpu("RTX 3070 Ti", "sm_86", 8, 608, None, None, "ds"),
    Gpu("RTX 3080 10GB", "sm_86", 10, 760, 59.5, 238, "wp"),
    Gpu("RTX 3080 12GB", "sm_86", 12, 912, None, None, "ds"),
    Gpu("RTX 3080 Ti", "sm_86", 12, 912, None, None, "ds"),
    Gpu("RTX 3090", "sm_86", 24, 936, 71, 284, "wp"),
    Gpu("RTX 3090 Ti", "sm_86", 24, 1008, None, None, "ds"),
    Gpu("RTX 4060", "sm_89", 8, 272, None, None, "ds"),
    Gpu("RTX 4060 Ti 8GB", "sm_89", 8, 288, None, None, "ds"),
    Gpu("RTX 4060 Ti 16GB", "sm_89", 16, 288, None, None, "ds"),
    Gpu("RTX 4070", "sm_89", 12, 504, None, None, "ds"),
    Gpu("RTX 4070 SUPER", "sm_89", 12, 504, None, None, "ds"),
    Gpu("RTX 4070 Ti", "sm_89", 12, 504, None, None, "ds"),
    Gpu("RTX 4070 Ti SUPER", "sm_89", 16, 672, None, None, "ds"),
    Gpu("RTX 4080", "sm_89", 16, 717, 97.5, 389.9, "wp"),
    Gpu("RTX 4080 SUPER", "sm_89", 16, 736, None, None, "ds"),
    Gpu("RTX 4090", "sm_89", 24, 1008, 165.2, 660.6, "wp"),
    Gpu("RTX 5060", "sm_120", 8, 448, None, None, "ds"),
    Gpu("RTX 5060 Ti 8GB", "sm_120", 8, 448, None, None, "ds"),
    Gpu("RTX 5060 Ti 16GB", "sm_120", 16, 448, None, None, "ds"),
    Gpu("RTX 5070", "sm_120", 12, 672, None, None, "ds"),
    Gpu("RTX 5070 Ti", "sm_120", 16, 896, None, None, "ds"),
    Gpu("RTX 5080", "sm_120", 16, 960, 112.6, 450.2, "wp"),
    Gpu("RTX 5090", "sm_120", 32, 1792, 209.5, 838, "wp"),
    Gpu("RTX A2000 12GB", "sm_86", 12, 288, 31.9, None, "ds"),
    Gpu("RTX A4000", "sm_86", 16, 448, 76.7, None, "ds"),
    Gpu("RTX A4500", "sm_86", 20, 640, 94.6, None, "ds"),
    Gpu("RTX A5000", "sm_86", 24, 768, 111.1, None, "ds"),
    Gpu("RTX A6000", "sm_86", 48, 768, 154.8, 309.7, "wp"),
    Gpu("RTX 4000 Ada", "sm_89", 20, 360, 106.9, None, "ds"),
    Gpu("RTX 4500 Ada", "sm_89", 24, 432, 158.5, None, "ds"),
    Gpu("RTX 5000 Ada", "sm_89", 32, 576, 261.1, None, "ds"),
    Gpu("RTX 6000 Ada", "sm_89", 48, 960, 364.2, 728.5, "wp"),
    Gpu("T4", "sm_75", 16, 320, 65, 130, "ds"),
    Gpu("A10", "sm_86", 24, 600, 125, 250, "ds"),
    Gpu("A30", "sm_80", 24, 933, 165, 330, "ds"),
    Gpu("A40", "sm_86", 48, 696, 149.7, 299.3, "ds"),
    Gpu("L4", "sm_89", 24, 300, 121, 242, "ds"),
    Gpu("L40", "sm_89", 48, 864, 181, 362, "ds"),
    Gpu("L40S", "sm_89", 48, 864, 362, 733, "ds"),
    Gpu("A100 40GB", "sm_80", 40, 1555, 312, 624, "ds"),
    Gpu("A100 80GB PCIe", "sm_80", 80, 1935, 312, 624, "ds"),
    Gpu("A100 80GB SXM", "sm_80", 80, 2039, 312, 624, "ds"),
    Gpu("H100 PCIe", "sm_90", 80, 2000, 756, 1513, "ds"),
    Gpu("H100 SXM", "sm_90", 80, 3350, 989, 1979, "ds"),
    Gpu("H200", "sm_90", 141, 4800, 989, 1979, "ds"),
    Gpu("Jetson Orin Nano 4GB", "sm_87", 4, 34, None, 10, "ds", shared=True),
    Gpu("Jetson Orin Nano 8GB", "sm_87", 8, 68, None, 20, "ds", shared=True),
    Gpu("Jetson Orin Nano Super 8GB", "sm_87", 8, 102, None, None, "ds", shared=True),
    Gpu("Jetson Orin NX 8GB", "sm_87", 8, 102.4, None, None, "ds", shared=True),
    Gpu("Jetson Orin NX 16GB", "sm_87", 16, 102.4, None, None, "ds", shared=True),
    Gpu("Jetson AGX Orin 32GB", "sm_87", 32, 204.8, None, None, "ds", shared=True),
    Gpu("Jetson AGX Orin 64GB", "sm_87", 64, 204.8, None, None, "ds", shared=True),
)


def find_gpu(name: str) -> Gpu:
    """Find a GPU by its name or a part of it: ``RTX 4090``, ``4090``, ``NVIDIA GeForce RTX 4090``, ``orin nx 16gb``.

    Raises:
        UsageError: no GPU or several (``a100``) have the name; with the nearest names.
    """
    found = look_up(name, {gpu.name: gpu.name for gpu in GPUS}, "GPU", ("rtx", "jetson"))
    return next(gpu for gpu in GPUS if gpu.name == found)
