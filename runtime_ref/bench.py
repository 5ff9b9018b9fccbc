#!/usr/bin/env python
"""Limits, static facts and measurements of the runtime's kernels.

    python runtime_ref/bench.py --roofline                     limit model of the published geometries, from arithmetic
    python runtime_ref/bench.py --scaling [--price CARD=DOLLARS --measured FILE --page F]
                                                               tokens/s and price of 1, 8 and 64 users, from the same model
    python runtime_ref/bench.py --static [--json F --page F]   ahead-of-time compilation: registers, spills, instructions
    python runtime_ref/bench.py --suite gpu --json FILE [--page F --checkpoint DIR]
                                                               correctness, then speed, on one GPU, in under ten minutes

An entry script: reads arguments and hands over. A speed is printed only after every check before it was green. Exit codes: 0, 1
if a check or a part of the suite failed, 2 for a mistake in the arguments or a machine that cannot run what was asked.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where runtime_ref/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.own_lines import own_lines_only

MODELS = ("MiMo-V2.5-Pro", "MiMo-V2.5", "MiMo-V2-Flash")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="runtime_ref/bench.py", description=__doc__.splitlines()[0])
    what = parse.add_mutually_exclusive_group(required=True)
    what.add_argument("--roofline", action="store_true", help="print the limit model (needs nothing installed)")
    what.add_argument("--scaling", action="store_true",
                      help="print tokens/s and price of 1, 8 and 64 users by the limit model (needs nothing installed)")
    what.add_argument("--static", action="store_true", help="compile every kernel ahead of time and check its gates (triton)")
    what.add_argument("--suite", choices=["gpu"], help="check and measure every kernel on this machine's GPU")
    parse.add_argument("--model", action="append", help="published geometry of the limit model (default: all)")
    parse.add_argument("--tokens", type=int, default=8, help="tokens of a verification block (default 8)")
    parse.add_argument("--acceptance", type=float, default=6.30, help="tokens accepted per step (default 6.30)")
    parse.add_argument("--price", action="append", metavar="CARD=DOLLARS", default=[],
                       help="per GPU and hour, for --scaling (default 3 for each card, an assumption)")
    parse.add_argument("--context", type=int, default=8192, help="tokens of each user for --scaling (default 8192)")
    parse.add_argument("--measured", type=Path, action="append", metavar="FILE", default=[],
                       help="JSON of --suite gpu whose figures take the place of assumptions of --scaling")
    parse.add_argument("--gpus", type=int, default=8, help="tensor-parallel GPUs (default 8)")
    parse.add_argument("--distinct-share", type=float, default=1.0, help="distinct experts relative to independent routing")
    parse.add_argument("--checkpoint", type=Path, metavar="DIR", help="exported folder that --suite gpu runs end to end")
    parse.add_argument("--only", nargs="+", metavar="PART",
                       help="measure only these parts of --suite: experts, quantize, training, steps, engine, peers")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the numbers of --static or --suite here")
    parse.add_argument("--page", type=Path, metavar="FILE",
                       help="write the table of --static, or the page of --suite or --scaling, here")
    return parse


def _roofline(args: argparse.Namespace) -> int:
    from modeling.published_geometries import released_config
    from runtime_ref.measure import roofline

    if args.tokens < 1 or args.gpus < 1 or args.acceptance <= 0 or args.distinct_share <= 0:
        raise ValueError("--tokens, --gpus, --acceptance and --distinct-share must be positive")
    texts = [roofline.report(name, released_config(name), tokens=args.tokens, acceptance=args.acceptance, gpus=args.gpus,
                             distinct_share=args.distinct_share) for name in args.model or MODELS]
    print("\n\n".join([*texts, roofline.published()]))
    return 0


def _scaling(args: argparse.Namespace) -> int:
    from modeling.published_geometries import released_config
    from runtime_ref.measure import roofline, scaling
    from storage.files import write_text

    prices = dict(scaling.Assumptions().dollars)
    for given in args.price:
        card, _, dollars = given.partition("=")
        if card not in prices or not dollars.replace(".", "", 1).isdecimal():
            raise ValueError(f"--price {given}: expected one of {', '.join(prices)}, '=' and dollars per hour")
        prices[card] = float(dollars)
    if args.context < 1 or args.distinct_share <= 0:
        raise ValueError("--context and --distinct-share must be positive")
    common = scaling.Assumptions(context=args.context, distinct_share=args.distinct_share, dollars=tuple(prices.items()))
    by_card = dict.fromkeys(roofline.BANDWIDTH, common)
    by_card |= dict(scaling.measured(path, common) for path in args.measured)
    (name,) = args.model or ["MiMo-V2.5-Pro"]
    text = scaling.page(name, released_config(name), by_card, " ".join(["python runtime_ref/bench.py", *args.given]),
                        gpus=args.gpus, block=args.tokens)
    print(text)
    if args.page:
        write_text(args.page, text)
    return 0


def _need_triton(option: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{option}: triton is not installed (pip install -e '.[gpu]'); --roofline needs nothing")


def _static(args: argparse.Namespace) -> int:
    _need_triton("--static")
    from runtime_ref.measure.static import gates as static_gates

    return static_gates.run(json_path=args.json, page_path=args.page)


def _suite(args: argparse.Namespace) -> int:
    _need_triton("--suite gpu")
    from runtime_ref.measure.gpu_suite import suite as gpu_suite

    if args.json is None:
        raise ValueError("--suite gpu: --json FILE is missing; expected a file for the numbers")
    return gpu_suite.run(args.json, args.checkpoint, args.page, args.only or ())


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    args.given = argv
    try:
        return next(job for wanted, job in ((args.roofline, _roofline), (args.scaling, _scaling), (args.static, _static),
                                            (True, _suite)) if wanted)(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    own_lines_only()
    sys.exit(main(sys.argv[1:]))
