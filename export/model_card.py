"""README.md of an exported checkpoint: what it is, what was measured, how to serve it. Nothing that was not measured.

Numbers come from the summary.json files of the runs that made the weights; a run that did not happen has no table. The text
depends on nothing else (no date, no timing of the export), so the same inputs give the same bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from checkpoint.families.registry import FAMILIES
from storage.reading import read_text
from storage.terminal import counted, readable_size

CARD_BYTES = 1 << 20


@dataclass
class Facts:
    """What a card is made of; `qat` and `drafter` are the runs' summaries, if they exist and made these weights."""

    name: str
    layout: str
    base: str
    scale_rule: str
    experts: str  # "trained", "rounded", "copied" (they were in MXFP4 already) or "decoded" (they are not quantized)
    dense_rounded: bool
    expert_matrices: int
    bytes_by_dtype: dict[str, int]
    draft: dict | None = None  # the drafter's config.json
    ungrouped: str | None = None  # why vLLM does not start with the drafter
    licence: dict = field(default_factory=dict)  # license, license_name, license_link of the base's card
    qat: dict | None = None
    drafter: dict | None = None
    config: dict = field(default_factory=dict)

    @property
    def block_size(self) -> int | None:
        return self.draft and self.draft["dflash_config"]["block_size"]


DECODED = ("`{base}` with every packed or scaled tensor multiplied out to bfloat16. Nothing was rounded to MXFP4: this is a "
           "checkpoint to train from, for jobs that read plain numbers only.")


def card(facts: Facts) -> str:
    """The whole README.md."""
    if facts.experts == "decoded":
        return "\n\n".join([_front_matter(facts), f"# {facts.name}, in plain numbers", DECODED.format(base=facts.base)]) + "\n"
    parts = [_front_matter(facts), f"# {facts.name}, experts in MXFP4", _what(facts)]
    trained = facts.qat and facts.experts != "rounded"
    parts += [_qat_table(facts.qat)] if trained else []
    parts += [_training(facts.qat)] if trained and facts.qat.get("training") else []
    parts += [_acceptance_table(facts)] if facts.drafter and facts.block_size else []
    parts += [_limits(facts), _serving(facts)]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts) -> str:
    tags = ["mxfp4", "fp4-quantization", "quantization-aware-training" if facts.experts != "rounded" else
            "post-training-quantization"] if facts.experts != "decoded" else []
    tags += ["moe", facts.config.get("model_type", "moe")]
    tags += ["custom_code"] if "auto_map" in facts.config else []
    tags += ["dflash", "speculative-decoding"] if facts.block_size else []
    fields = {**facts.licence, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if _hub_name(facts.base):  # a hub refuses a card whose base is a folder of this machine
        fields |= {"base_model": facts.base, "base_model_relation": "quantized"}
    fields |= {"tags": tags}
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---"


def licence_of(folders: list[Path]) -> dict:
    """What the first of the folders' cards says of its licence: license, license_name, license_link; {} if none does."""
    for folder in folders:
        try:
            text = read_text(folder / "README.md", CARD_BYTES)
            matter = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
        except (ValueError, RecursionError, yaml.YAMLError, IndexError):  # no card, or none that can be read
            continue
        keys = ("license", "license_name", "license_link")
        found = {key: matter[key] for key in keys if isinstance(matter.get(key), str)} if isinstance(matter, dict) else {}
        if found:
            return found
    return {}


def _hub_name(base: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()


def _what(facts: Facts) -> str:
    sizes = ", ".join(f"{dtype} {readable_size(size)}" for dtype, size in sorted(facts.bytes_by_dtype.items()))
    if facts.experts == "copied":
        how = "They are the base's own codes; nothing was rounded."
    elif facts.experts == "rounded":
        how = f"They were rounded after training (scale rule `{facts.scale_rule}`), without further training."
    else:
        how = ("They were trained on that grid (quantization-aware distillation); nothing was rounded when this checkpoint was "
               "written: the stored codes decode to the trained weights bit for bit.")
    rest = ("Everything else is in the precision of the base checkpoint." if facts.layout == "native"
            else "Everything else is in bfloat16" + (" (router biases in float32)." if "F32" in facts.bytes_by_dtype else "."))
    if facts.dense_rounded:
        rest = ("The attention projections and the dense MLP were also rounded, to FP8 E4M3 with one scale per 128 x 128 "
                "block; this was not part of training, and no table below includes its effect.")
    stored = ("have MXFP4 values and are stored decoded, in bfloat16" if facts.layout == "bf16" else "are stored in MXFP4")
    text = (f"Made from `{facts.base}`. The {facts.expert_matrices:,} matrices of the routed experts {stored}: "
            f"4-bit E2M1 codes and one power-of-two scale per 32 inputs. {how} {rest}\n\n"
            f"Layout `{facts.layout}`. Bytes: {sizes}.")
    if facts.layout != "native" and not facts.block_size:
        return text
    return text + (f"\n\n`dflash/` holds a DFlash drafter (block of {facts.block_size})." if facts.block_size
                   else "\n\nThis checkpoint has no drafter.")


def _qat_table(summary: dict) -> str:
    rows = ["## Held-out text", "", "| weights | loss (nats/token) | KL to original (nats/token) | top-1 agreement |",
            "|---|---|---|---|"]
    names = {"bf16": "original", "ptq": "experts rounded, untrained", "qat": "this checkpoint"}
    for key, label in names.items():
        row = summary[key]
        rows.append(f"| {label} | {row['loss']:.4f} | {row['kl']:.3g} | {100 * row['top1_agreement']:.2f} % |")
    environment = summary.get("environment", {})
    rows += ["", f"Share of the KL of plain rounding that training removed: {summary['kl_gap_closed']:.3f} "
             f"({summary['qat']['eval_tokens']:,} tokens; {summary.get('steps')} steps, seed {summary.get('seed')}; "
             f"{environment.get('cpu', 'unknown hardware')}, revision {environment.get('git_revision', 'unknown')}, "
             f"{environment.get('date', 'undated')})."]
    return "\n".join(rows)


def _training(summary: dict) -> str:
    """How the weights were made, from the run's own settings."""
    how = summary["training"]
    losses = ", ".join(f"{name} {weight:g}" for name, weight in how["loss"].items())
    per_update = summary["tokens"] // summary["steps"] if summary.get("steps") else 0
    covered = " Losses cover the assistant's answers alone." if how.get("loss_on") == "answers" else ""
    start = "" if how["warm_start"] == "none" else f" Initial codes were chosen by {how['warm_start']} on the same text."
    step = summary.get("result_of_step", summary.get("steps"))
    best = f" The weights are those of step {step}, the best on held-out text." if step != summary.get("steps") else ""
    trained = "only the routed experts learned" if how["train"] == "experts" else "all weights learned"
    return (f"## Training\n\nThe original model was the teacher, and {trained}. Text: "
            f"{', '.join(f'`{name}`' for name in how['data'])}, packed into rows of {how['sequence_length']:,} tokens; "
            f"{summary['tokens']:,} tokens in {counted(summary['steps'], 'update')} of {per_update:,}. Optimizer "
            f"{how['optimizer']}, peak learning rate {how['learning_rate']:g}; loss weights: {losses}.{covered}{start}{best}")


def _limits(facts: Facts) -> str:
    """What was not looked at, in words."""
    lines = ["## Limits", "", "- Rounding changes what a model says. No benchmark, safety or long-context evaluation was run "
             "for this card; evaluate it on your task beside the original."]
    if facts.qat and facts.experts != "rounded":
        lines.append("- The figures above are of held-out text of the training data's kind; other languages and subjects may "
                     "have lost more.")
        if facts.qat.get("helped") is False:
            lines.append("- **Training did not help: on held-out text plain rounding of the original is nearer to it.**")
    else:
        lines.append("- Nothing was measured on these weights." if facts.experts != "copied" else
                     "- Nothing was measured on these files; their values are the base's.")
    if facts.block_size:
        lines.append("- The drafter changes speed and not what is said. How many drafts are accepted depends on the text.")
    if facts.block_size and not facts.drafter:
        lines.append("- The drafter's acceptance was not measured with these weights.")
    licence = facts.licence.get("license_name") or facts.licence.get("license")
    lines.append(f"- The licence{f' ({licence})' if licence else ''}, intended use and limits of `{facts.base}` hold here too"
                 + ("." if licence else "; no card that names the licence was found beside its weights."))
    return "\n".join(lines)


def _drafter_training(summary: dict) -> list[str]:
    if "prompts" not in summary:
        return []
    whose = "dialogues of" if summary.get("own_data") else "answers of this checkpoint to prompts of"
    size, learned = f"{summary['parameters']:,} parameters", f"{summary['response_tokens']:,} tokens"
    names = ", ".join(f"`{name}`" for name in summary["prompts"])
    text = f"{size}, trained for {counted(summary['steps'], 'update')} on {summary['dialogues']:,} {whose} {names} ({learned})."
    return [text, ""]


def _acceptance_table(facts: Facts) -> str:
    tables = facts.drafter.get("acceptance") or {}
    kinds = {"task_t0": "tasks, greedy", "open_t0": "open text, greedy", "open_t1": "open text, temperature 1"}
    rows = ["## Drafter", "", *_drafter_training(facts.drafter),
            f"Mean number of tokens committed per target pass (block of {facts.block_size}; drawn text under the "
            "acceptance rule `rejection`):", "",
            "| domain | prompts | drafter | prompt lookup |", "|---|---|---|---|"]
    for domain, values in tables.items():
        rows += [f"| {domain} | {label} | {values[key]:.2f} | {values[f'lookup_{key}']:.2f} |"
                 for key, label in kinds.items() if key in values and f"lookup_{key}" in values]
    return "\n".join(rows)


def _serving(facts: Facts) -> str:
    lines = ["## Use", "", "Transformers:", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
             f'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="bfloat16"{_trust(facts)})',
             f'tokenizer = AutoTokenizer.from_pretrained("PATH"{_trust(facts)})', "```"]  # it reads config.json: asks otherwise
    if facts.layout == "compressed-tensors":
        lines += ["", "This layout needs `pip install compressed-tensors`. transformers may print that a pattern of the "
                  "quantized modules matches nothing: it looks for linear layers, and fused experts are decoded all the same."]
    if facts.layout == "hf-fp8":
        return "\n".join(lines)
    block, trust = facts.block_size, " --trust-remote-code" if "auto_map" in facts.config else ""
    fp8 = " --quantization fp8" if facts.layout == "native" else ""
    sglang = f"python3 -m sglang.launch_server --model PATH{fp8}{trust} --dtype bfloat16"
    vllm = f"vllm serve PATH{trust}"
    if block:
        window = facts.draft["dflash_config"].get("swa_window_size")
        sglang += (" \\\n  --speculative-algorithm DFLASH --speculative-draft-model-path PATH/dflash "
                   f"--speculative-num-draft-tokens {block}")
        sglang += f" --speculative-draft-window-size {window}" if window else ""
    if block and not facts.ungrouped:
        vllm += (' \\\n  --speculative-config \'{"method": "dflash", "model": "PATH/dflash", "num_speculative_tokens": '
                 f"{block - 1}}}'")
    without = f"\n\nThe command for vLLM is without the drafter, which has {facts.ungrouped}." if facts.ungrouped else ""
    family = FAMILIES.get(facts.config.get("model_type"))
    ours = ["python runtime_ref/serve.py PATH --port 8000"] if family and family.runtime_layout == facts.layout else []
    return "\n".join([*lines, "", "Engines (commands for these files' format; not run for this card):", "", "```bash", sglang,
                      vllm, *ours, "```"]) + without


def _trust(facts: Facts) -> str:
    return ", trust_remote_code=True" if "auto_map" in facts.config else ""
