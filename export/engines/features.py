"""Lists what the TensorRT packages can and can't do beside building: one table, asked by name.

An entry says why a package lacks a feature, and is empty if the package has it. ``tensorrt_rtx`` has attributes for several
features that do nothing or fail. So its entries were tried, not looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...runtime.errors import EngineError, UsageError
from ...runtime.executors.tensorrt.engine import HERE

TIMING_CACHE = "timing-cache"
HARDWARE_COMPATIBLE = "hardware-compatible"
VERSION_COMPATIBLE = "version-compatible"
WEIGHT_STREAMING = "weight-streaming"
REFITTABLE = "refittable"

CROSS_BUILD = "cross-build"
RUNTIME_CACHE = "runtime-cache"

# By feature and backend: the reason why it is missing, or "". The last two are no options: targets rest on one, and the other
# belongs to a program that runs a plan.
_MISSING = {
    TIMING_CACHE: {"tensorrt": "", "tensorrt-rtx": "its timing cache does nothing: kernels are compiled on the device"},
    HARDWARE_COMPATIBLE: {"tensorrt": "", "tensorrt-rtx": "a plan serves the target that it was built for: name each one"},
    VERSION_COMPATIBLE: {"tensorrt": "", "tensorrt-rtx": "its packages hold no lean runtime: build again for another version"},
    WEIGHT_STREAMING: {"tensorrt": "", "tensorrt-rtx": ""},
    REFITTABLE: {"tensorrt": "", "tensorrt-rtx": ""},
    CROSS_BUILD: {"tensorrt": "it builds for the GPU of this machine only", "tensorrt-rtx": ""},
    RUNTIME_CACHE: {"tensorrt": "its plans hold compiled kernels", "tensorrt-rtx": ""},
}
_FLAGS = {
    VERSION_COMPATIBLE: ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"),
    WEIGHT_STREAMING: ("WEIGHT_STREAMING",),
    REFITTABLE: ("REFIT",),
}
_OLDEST_COMPATIBLE = 80


def has(backend: str, feature: str) -> bool:
    """True if ``backend`` has ``feature``."""
    return not _MISSING[feature][backend]


def features_of(backend: str) -> tuple[str, ...]:
    """List the features that ``backend`` has."""
    return tuple(feature for feature in _MISSING if has(backend, feature))


def check_features(backend: str, features: Iterable[str], target: str) -> None:
    """Refuse features that the package lacks.

    Raises:
        UsageError: names the feature and the reason.
    """
    for feature in features:
        why = _MISSING[feature][backend]
        if why:
            raise UsageError(f"{backend} has no {feature}: {why}", hint=f"leave --{feature} out")
        if feature == REFITTABLE and backend == "tensorrt-rtx" and target != HERE:
            raise UsageError(
                f"{backend} builds refittable plans for the GPU of this machine only, not for {target}",
                hint="build on that GPU with --target here, or leave --refittable out",
            )


def is_compatible_target(target: str) -> bool:
    """True if a hardware-compatible plan runs on ``target``: Ampere and newer."""
    match = re.fullmatch(r"sm_(\d+)", target)
    return match is not None and int(match[1]) >= _OLDEST_COMPATIBLE


def apply_features(module: Any, config: Any, features: Iterable[str], timing_cache: Path | None) -> None:
    """Set features on a builder configuration.

    Raises:
        EngineError: this version of the package lacks one of them, or the timing cache is another version's.
    """
    for feature in features:
        try:
            for flag in _FLAGS.get(feature, ()):
                # Without the lean runtime a version-compatible plan holds no code for the host.
                config.set_flag(getattr(module.BuilderFlag, flag))
            if feature == HARDWARE_COMPATIBLE:
                config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
            if feature == TIMING_CACHE:
                assert timing_cache is not None
                _load_timing_cache(config, timing_cache)
        except AttributeError as error:
            version = module.__version__
            raise EngineError(f"{module.__name__} {version} has no {feature}: {error}", hint="use a newer version") from None


def _load_timing_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise EngineError(
            f"{path} is no timing cache of this version and GPU",
            hint="delete it, or name another file: it is made when it is missing",
        )


def save_timing_cache(config: Any, path: Path) -> None:
    """Write back what the build has learned.

    Raises:
        OSError: the file system refused; an older cache is still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
