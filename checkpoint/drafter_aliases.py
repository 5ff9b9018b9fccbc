"""Aliases in a drafter's config.json: the same thing stands under several keys, and engines differ in the one they believe.

A drafter is safe where they all say the same; `alias_faults` names what is missing or contradicts.
"""

from __future__ import annotations

from collections.abc import Iterator

from checkpoint.drafter_folder import ARCHITECTURE, Fault, special_of, window_of


def alias_faults(config: dict) -> Iterator[Fault]:
    """Keys that engines read differently: one that is missing, or that contradicts its alias."""
    special = special_of(config)
    if config.get("architectures") != [ARCHITECTURE]:
        yield Fault(f"architectures={config.get('architectures')!r}, expected [{ARCHITECTURE!r}]: vLLM and SGLang choose the "
                    "model's class by it", grave=False)
    yield from _window_faults(config, special)
    yield from _rotary_faults(config, special)
    if config.get("block_size", special["block_size"]) != special["block_size"]:
        yield Fault(f"block_size={config['block_size']!r} contradicts dflash_config, expected {special['block_size']}")
    elif "block_size" not in config:
        yield Fault(f"block_size is missing, expected {special['block_size']}", grave=False)


def _window_faults(config: dict, special: dict) -> Iterator[Fault]:
    window = window_of(config, special)
    causal = bool(special.get("causal", config.get("is_causal", False)))
    kind = "full_attention" if window is None else "sliding_attention"
    layers = [kind] * (config.get("num_hidden_layers") or 0)
    reads = (f"vLLM takes the window of dflash_config ({window}), SGLang that of layer_types and sliding_window; start it with "
             f"--speculative-draft-window-size {window}" if window is not None else "vLLM and SGLang differ")
    for key, expected, why in (
            ("layer_types", layers, reads), ("sliding_window", window, reads),
            ("use_sliding_window", window is not None, "transformers drops sliding_window without it, and with it what SGLang "
             "reads"),
            ("is_causal", causal, "vLLM and SGLang take sliding layers for causal unless it is false")):
        if key not in config:
            yield Fault(f"{key} is missing, expected {expected!r}: {why}", grave=False)
        elif config[key] != expected:
            yield Fault(f"{key}={config[key]!r} contradicts dflash_config, expected {expected!r}: {why}", grave=False)
    if window is not None and config.get("max_window_layers") != 0:
        yield Fault(f"max_window_layers={config.get('max_window_layers')!r}, expected 0: readers of Qwen3's keys see the whole "
                    "context in the layers below it", grave=False)
    if "causal" not in special:
        yield Fault(f"dflash_config.causal is missing, expected {causal}", grave=False)


def _rotary_faults(config: dict, special: dict) -> Iterator[Fault]:
    """The rotation is said three times, and engines differ in which they believe."""
    rope = config.get("rope_parameters") or {}
    if "rope_parameters" not in config:
        yield Fault("rope_parameters is missing", grave=False)
    base = special.get("backbone_rotary_base") or rope.get("rope_theta") or config.get("rope_theta")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    for key, value, expected in (("rope_parameters.rope_theta", rope.get("rope_theta", base), base),
                               ("rope_theta", config.get("rope_theta", base), base),
                               ("partial_rotary_factor", config.get("partial_rotary_factor", share), share)):
        if value != expected:
            other = "dflash_config.backbone_rotary_base" if "theta" in key else "rope_parameters"
            yield Fault(f"{key}={value!r} contradicts {other}, which has {expected!r}: vLLM and SGLang rotate by {key}, the "
                        f"published code by {other}", grave=False)
