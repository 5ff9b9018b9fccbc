"""How causes are named: faults that ports, exporters and configurations have, tried one by one.

When outputs disagree, each fault hypothesis changes an independent model (float32) in the one way that its bug would, and the
run is repeated. The one whose change makes the disagreement vanish *is* the cause, whether the folder is wrong (the change is
the remedy: the changed model gives the stored reference) or an engine is (the changed model gives the engine's outputs).
Nothing is guessed from the size of an error. A number (a window, a rotary base) is searched for, not listed: from a few starts
towards the value that leaves nothing over. A cause that is not known is still located: the first layer whose output parts.

The faults themselves: `fault_table.py`, written against `model_view.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from runtime_ref.validation.diagnosis.model_view import ModelView, view_of

# Relative error (Frobenius) below which two runs are the same run: float32 sums in another order give 1e-6 to 1e-5, the
# smallest bug of the list, another epsilon in the norms, 2e-4.
SAME = 1e-4
# Runs that a search may take beyond its starts, and the share of the difference that its best start must remove to go on.
SEARCH_RUNS, WORTH_SEARCHING = 40, 0.05

Run = Callable[[torch.nn.Module], torch.Tensor]


@dataclass(frozen=True)
class Fault:
    """A fault hypothesis.

    Attributes:
        cause: in one line. change: turns the viewed copy of the right model into what the bug makes of it (or back); False
            where the bug cannot be.
        starts: for a fault with a number: where the search begins; `change` then takes the number too.
        whole: the number is an integer; it is searched for on a logarithmic scale otherwise.
    """

    name: str
    cause: str
    change: Callable[..., bool | None]
    starts: tuple[float, ...] = ()
    whole: bool = False

    def at(self, value: float) -> Fault:
        """The fault with its number."""
        return replace(self, name=f"{self.name}={value:.6g}", change=lambda view: self.change(view, value), starts=())


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error (Frobenius); infinite for other shapes and non-finite values."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


def error_of(model: torch.nn.Module, fault: Fault, run: Run, observed: torch.Tensor) -> float:
    """What is left of the difference if a copy of the model has the fault; infinite where it cannot have it."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        return float("inf") if fault.change(view_of(changed)) is False else difference(run(changed), observed)


def best_of(model: torch.nn.Module, fault: Fault, run: Run, observed: torch.Tensor, before: float) -> tuple[float, Fault]:
    """(what is left of the difference, the fault with its number) of the best number found.

    Args:
        before: the difference without any fault.
    """
    if not fault.starts:
        return error_of(model, fault, run, observed), fault
    tried: dict[float, float] = {}

    def left(value: float) -> float:
        if value not in tried:
            tried[value] = error_of(model, fault.at(value), run, observed)
        return tried[value]

    best = min(fault.starts, key=left)
    if left(best) >= SAME and left(best) < (1 - WORTH_SEARCHING) * before:
        best = _search(left, best, sorted(set(fault.starts)), fault.whole)
    return left(best), fault.at(best)


def _search(left: Callable[[float], float], best: float, starts: list[float], whole: bool) -> float:
    """The number that leaves least, between the neighbours of the best start: by golden sections, or of integers."""
    place = starts.index(best)
    low, high = starts[max(0, place - 1)], starts[min(len(starts) - 1, place + 1)]
    if whole:
        return _search_integers(left, best, int(low), int(high))
    a, b, ratio = math.log(low), math.log(high), (math.sqrt(5) - 1) / 2
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    for _ in range(SEARCH_RUNS):
        if min(left(math.exp(c)), left(math.exp(d))) < SAME:
            break
        if left(math.exp(c)) < left(math.exp(d)):
            b, d, c = d, c, d - ratio * (d - a)
        else:
            a, c, d = c, d, c + ratio * (b - c)
    return min((best, math.exp(c), math.exp(d)), key=left)


def _search_integers(left: Callable[[float], float], best: float, low: int, high: int) -> float:
    """All of a short range; in a long one ever smaller steps downhill, then all near their end."""
    step = (high - low) // 8
    while high - low > SEARCH_RUNS and step:
        near = min((best - step, best + step), key=left)
        if left(near) < left(best):
            best = near
        else:
            low, high, step = max(low, int(best) - step), min(high, int(best) + step), step // 2
    return min((best, *map(float, range(low, high + 1))), key=left)


def matching_faults(model: torch.nn.Module, faults: Iterable[Fault], run: Run, observed: torch.Tensor) -> list[Fault]:
    """The faults that make `run(model)` equal to `observed`."""
    with torch.no_grad():
        before = difference(run(model), observed)
    found = (best_of(model, fault, run, observed, before) for fault in faults)
    return [fault for error, fault in found if error < SAME]


def first_matching_fault(model: torch.nn.Module, faults: Iterable[Fault], run: Run, observed: torch.Tensor) -> list[Fault]:
    """As `matching_faults`, but ends with the first: for long lists in which one bug has one name."""
    for fault in faults:
        found = matching_faults(model, [fault], run, observed)
        if found:
            return found
    return []


def nearest_faults(model: torch.nn.Module, faults: Iterable[Fault], run: Run, observed: torch.Tensor) -> list[Fault]:
    """The fault that comes nearest to outputs of rounded arithmetic, which no fault equals, and those that come as near:
    none if the best leaves more than half of the difference."""
    with torch.no_grad():
        before = difference(run(model), observed)
    errors = [best_of(model, fault, run, observed, before) for fault in faults]
    best = min((error for error, _ in errors), default=float("inf"))
    return [fault for error, fault in errors if error <= min(1.1 * best, before / 2)]


def only_in(model: torch.nn.Module, layers: Sequence[int], faults: Iterable[Fault]) -> Iterator[Fault]:
    """The same faults, but in these layers of the model alone: in a file one layer can be wrong and the others right.

    Args:
        model: the model that `matching_faults` will change copies of.
    """
    named = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"

    def limited(change):
        def apply(view: ModelView, *value) -> bool | None:
            if change(view, *value) is False:
                return False
            own = model.model
            view.body.embed_tokens, view.body.norm, view.model.lm_head = own.embed_tokens, own.norm, model.lm_head
            for i, layer in enumerate(own.layers):
                if i not in layers:
                    view.body.layers[i] = layer
            return None

        return apply

    for fault in faults:
        yield replace(fault, name=f"{fault.name} in {named}", cause=f"{fault.cause} (in {named} only)",
                      change=limited(fault.change))
