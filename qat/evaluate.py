"""Held-out evaluation of three models: the original (BF16), it with plainly rounded experts (PTQ), the trained one (QAT).

For each: next-token loss (nats per token), KL to the original model (nats per token, teacher || student), and top-1
agreement with it. `kl_gap_closed` = 1 - KL(qat) / KL(ptq): the share of the damage done by plain rounding that training
repaired. All variants run through the same code in the same dtype on the same rows.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from mxfp4.fake_quant import fake_quantize_
from qat.data import split_rows
from qat.expert_quantizer import ExpertQuantizer
from qat.losses import chunked_statistics, output_head, run_hidden
from training.intervals import ratio_interval

FEWEST_ROWS = 4  # of each domain, for an interval


@torch.no_grad()
def evaluate_domains(model: nn.Module, teacher: nn.Module, domains: dict[str, torch.Tensor], *, batch_size: int,
                     accelerator=None, chunk_tokens: int = 2048, together: bool = False) -> dict[str, dict]:
    """Loss, KL to the teacher and top-1 agreement of `model`, for each domain and (token-weighted) over all; of each domain
    `row_kl` and `row_tokens` too, the KL of each row and how many of its tokens count.

    Args:
        model, teacher: causal language models in eval mode, on one device.
        domains: int64 [rows, T] by domain, as packed (`qat.data.split_rows`): what a loss does not cover is not judged either.
        accelerator: splits the rows over its processes and sums their results.
        together: every process runs equally many batches, as the collectives of a sharded model demand; what is too many is
            not counted.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    results: dict[str, dict] = {}
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for domain, rows in domains.items():
        sums = torch.zeros((rows.shape[0], 4), dtype=torch.float64, device=device)
        for first in range(0 if together else rank * batch_size, rows.shape[0], world * batch_size):
            start = first + rank * batch_size if together else first
            counted = start < rows.shape[0]
            batch = rows[start:start + batch_size] if counted else rows[:1]
            found = _row_sums(model, teacher, batch.to(device), chunk_tokens)
            if counted:
                sums[start:start + batch_size] = found
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="sum")
        results[domain] = _means(sums.sum(0)) | {"row_kl": _row_kl(sums), "row_tokens": sums[:, 3].tolist()}
        total += sums.sum(0)
    results["all"] = _means(total)
    return results


class HeldOut:
    """Held-out text on which a model is measured again and again while it trains; the teacher reads it once.

    Its last hidden states are kept: 2 bytes x hidden size per token in bf16.
    """

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, domains: dict[str, torch.Tensor], *, sequences: int, batch_size: int,
                 chunk_tokens: int):
        self.teacher, self.chunk_tokens = teacher, chunk_tokens
        device = next(teacher.parameters()).device
        self.batches = {name: [(part, _hidden(teacher, part)) for part in rows[:sequences].to(device).split(batch_size)]
                        for name, rows in domains.items()}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict:
        """Means over all tokens, as `evaluate_domains` gives them, and by domain; `row_kl`: KL of each row, nats per token, so
        that two models can be compared row by row."""
        with evaluation_mode(model):
            rows = {name: torch.cat([_row_sums(model, self.teacher, ids, self.chunk_tokens, taught) for ids, taught in batches])
                    for name, batches in self.batches.items()}
        sums = {name: of.sum(0) for name, of in rows.items()}
        return _means(sum(sums.values())) | {
            "domains": {name: _means(of) for name, of in sums.items()},
            "row_kl": {name: _row_kl(of) for name, of in rows.items()}}


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """Every module in evaluation mode, and then as it was: modes may differ from module to module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _hidden(model: nn.Module, rows_BT: torch.Tensor) -> torch.Tensor:
    """Last hidden states [N, H] of the positions that predict a token which counts."""
    ids, counted = split_rows(rows_BT)
    last = run_hidden(model, ids).last[:, :-1]
    return last.flatten(0, 1) if counted is None else last[counted[:, :-1]]


def _row_sums(model, teacher, rows_BT, chunk_tokens, teacher_h=None) -> torch.Tensor:
    """float64 [B, 4]: sums of loss, KL and agreement over the tokens of each row that count, and their number."""
    student_h = _hidden(model, rows_BT)
    if teacher_h is None:
        teacher_h = student_h if teacher is model else _hidden(teacher, rows_BT)
    labels, heads = rows_BT[:, 1:], (output_head(model), output_head(teacher))
    sizes, found = (labels >= 0).sum(1).tolist(), []
    for row, student, taught in zip(labels, student_h.split(sizes), teacher_h.split(sizes), strict=True):
        sums = chunked_statistics(student, heads[0], row[row >= 0], teacher_NH=taught, teacher_head=heads[1],
                                  chunk_tokens=chunk_tokens)
        found.append(torch.stack([v.double() for v in (sums.cross_entropy, sums.kl, sums.agree,
                                                       student.new_tensor(sums.tokens, dtype=torch.float64))]))
    return torch.stack(found).to(rows_BT.device)


def _row_kl(sums: torch.Tensor) -> list[float]:
    """Nats per token, of sums [rows, 4]."""
    return (sums[:, 1] / sums[:, 3].clamp_min(1)).tolist()


def _means(sums: torch.Tensor) -> dict[str, float]:
    loss, kl, agree, tokens = sums.tolist()
    return {"loss": loss / tokens, "kl": kl / tokens, "top1_agreement": agree / tokens, "eval_tokens": int(tokens)}


@torch.no_grad()
def compare(model: nn.Module, teacher: nn.Module, quantizer: ExpertQuantizer, originals: Iterable[torch.Tensor],
            domains: dict[str, torch.Tensor], *, dtype: str = "model", **options) -> dict:
    """Evaluates BF16, PTQ and QAT weights; neither model is changed.

    What is trained beside experts (`qat.train: all`) belongs to QAT alone: plain rounding is that of the original model.

    Args:
        model: the trained one, with quantized experts. teacher: the original.
        originals: the unquantized expert weights, in the quantizer's order.
        dtype: "model", or "float32": run float32 copies of both models, so that what differs is the weights alone and
            not also the rounding of activations (a bf16 model differs from its own float32 run by a KL of the order
            of a tenth of what MXFP4 rounding does). Needs memory for two float32 copies, "model" for one set of experts.
        options: passed to `evaluate_domains`.

    Returns:
        {"bf16": ..., "ptq": ..., "qat": ...} (each with loss, kl, top1_agreement, domains), kl_gap_closed and its interval.
    """
    judge = copy.deepcopy(teacher).float() if dtype == "float32" else teacher
    variants = {"bf16": evaluate_domains(judge, judge, domains, **options)}
    # One after the other: the plainly rounded experts are gone before the student's float32 copy is made.
    variants["ptq"] = evaluate_domains(_rounded(judge, quantizer, originals), judge, domains, **options)
    student = copy.deepcopy(model).float() if dtype == "float32" else model
    with evaluation_mode(student):
        variants["qat"] = evaluate_domains(student, judge, domains, **options)
    return summarized(variants)


def summarized(variants: dict[str, dict]) -> dict:
    """The results of `evaluate_domains` for bf16, ptq and qat -> what `compare` returns."""
    summary = {name: {**result.pop("all"), "domains": result} for name, result in variants.items()}
    trained, plain = summary["qat"], summary["ptq"]
    summary["kl_gap_closed"] = 1 - trained["kl"] / plain["kl"] if plain["kl"] > 0 else 0.0
    rows = [[(tokens * own, tokens * others) for tokens, own, others in zip(of["row_tokens"], of["row_kl"],
                                                                            plain["domains"][name]["row_kl"], strict=True)]
            for name, of in trained["domains"].items()]
    if min(map(len, rows)) >= FEWEST_ROWS and plain["kl"] > 0 and math.isfinite(trained["kl"]):
        summary["kl_gap_closed_interval"] = [1 - share for share in reversed(ratio_interval(rows))]
    return summary


def shown(kl: float) -> str:
    """A KL with digits that count: five after the point, or three of a small one."""
    return f"{kl:.5f}" if kl >= 0.001 or kl == 0 else f"{kl:.2e}"


def helped(summary: dict) -> bool:
    """Whether training left less KL than plain rounding, as far as the held-out text says."""
    return summary["qat"]["kl"] < summary["ptq"]["kl"] or summary["ptq"]["kl"] == 0


def doubt(summary: dict) -> str | None:
    """A line about a run that did not help, or of which that cannot be told, or None."""
    plain, trained = summary["ptq"]["kl"], summary["qat"]["kl"]
    if helped(summary):
        low, high = summary.get("kl_gap_closed_interval", (1, 1))
        return None if low > 0 else (f"whether training helped cannot be told: between {low:.3f} and {high:.3f} of the KL gap "
                                     "is closed (95 % over held-out rows); more rows (data.eval_sequences) or more steps")
    return (f"training did not help: KL to the original is {shown(trained)}, and {shown(plain)} with plain rounding; a lower "
            "qat.optimizer.learning_rate, more steps or a start (qat.warm_start) are what helps usually")


def _rounded(model: nn.Module, quantizer: ExpertQuantizer, originals: Iterable[torch.Tensor]) -> nn.Module:
    """A copy of the frozen `model` whose experts are `originals`, plainly rounded; it shares everything else with it."""
    shared: dict[int, torch.Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for tensor, original in zip(quantizer.tensors, originals, strict=True):
        expert = model.get_parameter(tensor.name)
        value = torch.empty_like(expert.data)
        fake_quantize_(value, original.data, scale_rule=quantizer.scale_rule, axis=tensor.axis)
        shared[id(expert)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(model, shared)


def comparison_table(summary: dict):
    """The three variants, for all held-out text and by domain, as a rich table."""
    from rich.table import Table

    title = f"held-out text: KL gap closed {summary['kl_gap_closed']:.3f}"
    if "kl_gap_closed_interval" in summary:
        title += " (95 % over rows: {:.3f} to {:.3f})".format(*summary["kl_gap_closed_interval"])
    table = Table(title=title)
    for column in ("weights", "domain", "loss (nats/token)", "KL to original", "top-1 agreement"):
        table.add_column(column, justify="left" if column in ("weights", "domain") else "right")
    for name in ("bf16", "ptq", "qat"):
        for domain, row in {"all": summary[name], **summary[name]["domains"]}.items():
            table.add_row(name if domain == "all" else "", domain, f"{row['loss']:.4f}", shown(row["kl"]),
                          f"{100 * row['top1_agreement']:.2f} %")
    return table
