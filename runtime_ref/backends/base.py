"""What an engine asks of a backend and of a drafter, whichever ops run them.

A backend holds one rank's weights and caches and runs programs (`core.program`) over batches (`core.batch`); a drafter belongs
to a backend and proposes tokens. Callers never ask for a backend's name or feel for attributes: what differs between backends
is in `Capabilities`. `backends.load` is the only place that turns a name into a backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import KvCache, Pool, Table
from runtime_ref.core.launch_report import LaunchReport
from runtime_ref.core.markov import MarkovHead
from runtime_ref.core.program import Op
from runtime_ref.core.tensor_parallel import Ranks

DRAFTER_PRECISIONS = ("bf16", "int8")


@dataclass(frozen=True)
class Capabilities:
    """What callers must know of a backend.

    Attributes:
        name: as in reports and on the command line.
        float32: whether it can compute in float32, so that it can be exact.
        single_ops: whether `Backend.ops` can be called one by one.
        verifies_on_device: whether drafts, tokens and verdicts are chosen where the logits are (`engine.accept_on_device`).
        packed_weights: whether a step reads experts as codes and scales and other weights in bf16, as the file has them; else
            float32 copies.
        mxfp8_activations: whether activations are rounded to MXFP8 where they enter experts.
        row_multiple: rows of a step are padded to a multiple of this.
    """

    name: str
    float32: bool = True
    single_ops: bool = True
    verifies_on_device: bool = False
    packed_weights: bool = False
    mxfp8_activations: bool = False
    row_multiple: int = 1


@dataclass(frozen=True)
class Cut:
    """Which drafts of a block are put before the target: those that it is likely to come to.

    Attributes:
        worth: the least product of a draft's probability of being right and of those before it.
        truth: 16 float32: how often a draft is right whose probability according to the drafter lies in that sixteenth.
    """

    worth: float
    truth: array


class Backend(ABC):
    """One rank's weights and caches, and the ops of a step.

    Attributes:
        config: sizes of the model (`MiMoV2Config`, or `checkpoint.families.geometry.Geometry`).
        dtype: of the residual stream and the caches.
        ranks: which share of the model this is.
        weights: the same share in the reference backend's form (`checkpoints.host_weights.TargetWeights`).
        pools: pages of the KV cache by kind ("full", "window").
        device: where logits and target hidden states lie, "cpu" or "cuda".
        ops: by name, for backends with `capabilities.single_ops`; called with (step, layer, *buffers).
    """

    config: object
    dtype: torch.dtype
    ranks: Ranks
    pools: dict[str, Pool]
    device: str = "cpu"
    ops: dict[str, Callable]

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """See `Capabilities`."""

    @abstractmethod
    def plan(self, chunks: list[SequenceChunk]):
        """The step that computes the tokens of `chunks`, whose page tables must reach to their ends. Sets `chunk.row`."""

    @abstractmethod
    def run(self, program: list[Op], step, watch: Callable[[Op, dict], None] | None = None, *,
            host: bool = True) -> dict[str, torch.Tensor]:
        """Runs a program over a planned step.

        Args:
            watch: is called with (op, buffers) after each op; the program then runs op by op.
            host: copy logits to the host.

        Returns:
            Buffers by name: "logits" float32 [rows that want them, vocabulary], "target_hidden.<layer>" [rows, H].
        """

    def run_round(self, program: list[Op], chunks: list[SequenceChunk], drafter: Drafter, drafting: list[int],
                  requests: list[DraftRequest], cuts: list[Cut | None]) -> tuple[dict, list[list[float]]]:
        """A step whose drafts are made and put into it in the same call, for drafters with `one_call`.

        Args:
            drafting: which chunks get drafts: their tokens are the anchor and as many zeros as `requests` say, and afterwards
                the anchor and the drafts that were kept. cuts: None: all are kept.

        Returns:
            Buffers as of `run` with the rows that were kept, and the drafts' probabilities according to the drafter.
        """
        raise NotImplementedError(f"backend {self.capabilities.name}: drafts are made apart")

    @abstractmethod
    def load_drafter(self, folder: str | Path, pages: int, context: int, *, precision: str = "bf16") -> Drafter:
        """The drafter of a `dflash/` folder on this backend's ops.

        Args:
            pages: of its KV pool. context: the longest sequence in tokens.
            precision: one of `DRAFTER_PRECISIONS`: of its weights and of what enters its products. int8 is for the c backend.

        Raises:
            ValueError: missing or unexpected tensors, no mask embedding, a drafter of another target, an option that this
                backend does not run.
        """

    def only_bf16_drafts(self, precision: str) -> None:
        """For backends whose drafters have no int8.

        Raises:
            ValueError: another precision than bf16.
        """
        if precision != "bf16":
            raise ValueError(f"--drafter-precision {precision}: the {self.capabilities.name} backend drafts in bf16; expected "
                             "bf16, or the c backend")

    def choose_launch(self, asked: str, program: list[Op], drafter: Drafter | None, cache: KvCache, running: int,
                      context: int) -> tuple[LaunchReport, Drafter | None]:
        """Decides how steps of this program and rounds of this drafter are launched (`core.launch_report.LAUNCHES`).

        Args:
            running: sequences that will be served side by side. context: tokens of the longest.

        Returns:
            What was chosen and why, and the drafter to use from now on.

        Raises:
            ValueError: a way that this backend, model or machine does not have, asked for by name.
        """
        if asked not in ("auto", "ops"):
            raise ValueError(f"--launch {asked}: the {self.capabilities.name} backend has no other way than its ops, expected "
                             "auto or ops; the triton backend has persistent and graph")
        return LaunchReport({"target": "ops"} | ({} if drafter is None else {"drafter": "ops"})), drafter

    def wait_flags(self, drafter: Drafter | None) -> list[torch.Tensor]:
        """int32 on the device, not zero where a program or rank gave up waiting inside a launch of a step or of its drafts: to
        be read before anything of the step is used. Empty where nothing waits inside launches."""
        return []

    def plan_of_rows(self):
        """A step of eight rows without a sequence, for `ops` that look at rows only."""
        raise NotImplementedError(f"backend {self.capabilities.name}: ops cannot be called one by one")


class Drafter(ABC):
    """What proposes tokens.

    Attributes:
        block: tokens of a round, the anchor included.
        target_layers: those whose outputs it reads, in its order; empty: none.
        pool: pages of its context, None for a drafter without a cache.
        markov: how drafts of a block depend on each other; None: not at all.
        one_call: whether `Backend.run_round` runs its rounds (of the likeliest tokens).
    """

    block: int
    target_layers: list[int]
    pool: Pool | None = None
    markov: MarkovHead | None = None
    one_call: bool = False

    @abstractmethod
    def logits(self, requests: list[DraftRequest]) -> list[torch.Tensor]:
        """Draft logits [count, vocabulary] float32 of each sequence; their pending features enter the context first."""

    def extend_tables(self, target_hidden: torch.Tensor, start: int, table: Table) -> None:
        """Takes features [n, target layers * H] of positions start .. start + n - 1 of one sequence into the context."""
        raise NotImplementedError("a drafter without a context")
