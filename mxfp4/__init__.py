"""The MXFP4 number format: the only place of the project where rounding to four bits exists.

`format` is the format in one page, `codec` the reference, `fake_quant` the same numbers for training, fast. The names
are loaded on first use, because a recipe names a scale rule and its validation must not wait for torch.
"""

import importlib

_HOME = {
    "BLOCK_SIZE": "mxfp4.format",
    "ScaleRule": "mxfp4.format",
    "quantize": "mxfp4.codec",
    "dequantize": "mxfp4.codec",
    "fake_quantize": "mxfp4.fake_quant",
    "fake_quantize_": "mxfp4.fake_quant",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
