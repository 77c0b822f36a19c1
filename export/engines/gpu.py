"""Asks the driver which GPU this machine has: no CUDA toolkit, no package."""

from __future__ import annotations

import ctypes
from typing import Any

from ...runtime.errors import EngineError
from ...runtime.executors.tensorrt.engine import HERE

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NAME_A_TARGET = "name a target, such as sm_89"


def resolve_target(target: str) -> str:
    """Return ``target``, or for ``here`` the architecture of this machine's first GPU, such as ``sm_89``.

    Raises:
        EngineError: there is no driver or no GPU.
    """
    return _compute_capability(_driver()) if target == HERE else target


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(f"there is no GPU here: {error}", hint=_NAME_A_TARGET) from None


def _compute_capability(driver: Any) -> str:
    device = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        code = code or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    if code:
        raise EngineError(f"the NVIDIA driver says error {code}", hint=_NAME_A_TARGET)
    return "sm_{}{}".format(*numbers)
