"""Draws the pictures of the documentation into docs/pictures/.

    python tools/pictures.py [NAME ...]      # jobs, mxfp4, dflash-round; all by default
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(ROOT)

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mxfp4.format import E2M1_VALUES, ScaleRule

INK, BLUE, GREEN, AMBER, RED, GREY = "#1f2933", "#d6e4f5", "#d8efdc", "#fbe8c8", "#f6d3d0", "#eceff2"


def canvas(width: float, height: float):
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes, x: float, y: float, w: float, h: float, text: str, color: str = GREY, size: float = 9, **style) -> None:
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=INK,
                                  linewidth=1))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK, **style)


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.2))


def jobs():
    """One recipe, four jobs, and the folder that each leaves."""
    figure, axes = canvas(11, 2.9)
    names = [("1  quantization-\naware training", "qat/train.py", BLUE, "runs/NAME/qat/model\nexperts on the MXFP4 grid"),
             ("2  drafter training", "dflash_train/train.py", GREEN, "runs/NAME/dflash/model\nDFlash drafter, block 8"),
             ("3  export", "export/to_hf.py", AMBER, "runs/NAME/export/model\none Hugging Face folder"),
             ("4  serve and validate", "runtime_ref/serve.py, validate.py", RED, "OpenAI API; verdict\nin text, JSON, HTML")]
    for i, (title, script, color, result) in enumerate(names):
        x = 0.2 + 2.75 * i
        box(axes, x, 1.05, 2.2, 0.85, title, color, 10, weight="bold")
        axes.text(x + 1.1, 0.93, script, ha="center", va="top", fontsize=8, family="monospace", color=INK)
        axes.text(x + 1.1, 0.58, result, ha="center", va="top", fontsize=8, color=INK)
        if i:
            arrow(axes, (x - 0.55, 1.47), (x, 1.47))
        if i < 3:  # the runtime's only input is the exported folder
            arrow(axes, (x + 1.1, 2.35), (x + 1.1, 1.92))
    box(axes, 0.2, 2.35, 7.7, 0.4, "recipe.yaml", GREY, 10, family="monospace")
    return figure


def mxfp4():
    """A block of 32 weights: one shared power of two, and 4 bits each."""
    figure, axes = canvas(11, 3.3)
    axes.text(0.2, 3.1, "32 neighbours along the input dimension share one scale byte: 32 x 4 + 8 bits = 4.25 bits a weight",
              fontsize=10, weight="bold", color=INK, va="center")
    box(axes, 0.2, 2.3, 1.5, 0.5, "E8M0 byte b\nscale 2^(b-127)", AMBER, 8)
    for i in range(12):
        label = f"code {i}" if i < 10 else "..." if i == 10 else "code 31"
        box(axes, 1.9 + 0.74 * i, 2.3, 0.7, 0.5, label, BLUE, 8)
    axes.text(0.2, 1.95, "a code is sign, 2 exponent bits, 1 mantissa bit (E2M1); its values, before the scale:", fontsize=9,
              color=INK, va="center")
    axes.plot([0.6, 10.4], [1.3, 1.3], color=INK, linewidth=1)
    for value in sorted(set(E2M1_VALUES)):
        x = 5.5 + value * 0.8
        axes.plot([x, x], [1.22, 1.38], color=INK, linewidth=1.4)
        axes.text(x, 1.12, f"{value:g}", ha="center", va="top", fontsize=8, color=INK)
    rules = {ScaleRule.FLOOR: "cuts what is above 6", ScaleRule.RCEIL: "never cuts", ScaleRule.EVEN: "largest is 4 or 6",
             ScaleRule.MSE: "least squared error"}
    for i, (rule, text) in enumerate(rules.items()):
        box(axes, 0.2 + 2.7 * i, 0.15, 2.5, 0.5, f"{rule.value}: {text}", GREEN if rule is ScaleRule.EVEN else GREY, 8.5)
    axes.text(0.2, 0.78, "scale rules:", fontsize=9, color=INK, va="center")
    return figure


def dflash_round():
    """One round of block-diffusion drafting, block 8, four drafts accepted."""
    figure, axes = canvas(11, 4.6)
    y = 3.6
    axes.text(0.2, 4.4, "One round: the drafter proposes 7 tokens in one pass, the target verifies them in one pass",
              fontsize=10, weight="bold", color=INK, va="center")
    axes.text(0.2, y + 0.25, "text so far", fontsize=9, color=INK, va="center")
    for i, token in enumerate(("def", "add", "(", "a", ",")):
        box(axes, 1.6 + 0.62 * i, y, 0.56, 0.5, token, GREY, 9)
    box(axes, 1.6 + 0.62 * 5, y, 0.7, 0.5, "anchor\nb", AMBER, 8)
    axes.text(0.2, y - 0.6, "drafter sees", fontsize=9, color=INK, va="center")
    box(axes, 1.6, y - 0.85, 3.04, 0.5, "target's hidden states (window)", BLUE, 8.5)
    box(axes, 4.7, y - 0.85, 0.7, 0.5, "b", AMBER, 9)
    for i in range(7):
        box(axes, 5.46 + 0.7 * i, y - 0.85, 0.64, 0.5, "MASK", GREY, 8)
    arrow(axes, (3.1, y), (3.1, y - 0.33))
    axes.text(0.2, y - 1.6, "drafter says", fontsize=9, color=INK, va="center")
    drafts = (")", ":", "\\n", "return", "b", "+", "a")
    for i, token in enumerate(drafts):
        box(axes, 5.46 + 0.7 * i, y - 1.85, 0.64, 0.5, token, GREEN if i < 4 else RED, 9)
        arrow(axes, (5.78 + 0.7 * i, y - 0.87), (5.78 + 0.7 * i, y - 1.33))
    axes.text(0.2, y - 2.6, "target says", fontsize=9, color=INK, va="center")
    target = (")", ":", "\\n", "return", "a", "", "", "")
    for i, token in enumerate(target):
        if token:
            box(axes, 5.46 + 0.7 * i, y - 2.85, 0.64, 0.5, token, GREEN if i < 4 else AMBER, 9)
    axes.text(0.2, y - 3.35, "4 drafts accepted and 1 token of the target's own: this round has length 5 (of at most 8); the "
              "new token is the next anchor.\nAt temperature 0 a draft is accepted if it is the target's token; above, with "
              "probability min(1, p/q): the text is the target's either way.", fontsize=9, color=INK, va="center")
    return figure


PICTURES = {"jobs": jobs, "mxfp4": mxfp4, "dflash-round": dflash_round}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], default=[], help="pictures to draw; none: all")
    for name in parser.parse_args(argv).names or PICTURES:
        figure = PICTURES[name]()
        path = ROOT / "docs/pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white", metadata={"Software": None})
        plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
