#!/usr/bin/env python
"""Verifies a checkpoint from disk: `python export/verify.py CHECKPOINT_DIR [--against TRAINING_DIR] [--json FILE]`.

Any checkpoint of a known layout: exports of this project, releases, drafters by themselves. Everything is said in one run,
with the tensor or file it is about: FOUND is wrong, "not checked" says what could not be checked here and why, "note" is what
engines read differently. `checkpoint.verify` says what is looked at. Exit code: 0 nothing wrong, 1 something is, 2 a mistake
in the arguments.
"""

import argparse
import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where export/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.own_lines import own_lines_only
from storage.terminal import counted, printable, printable_line, readable_size


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="export/verify.py", description="Verify a checkpoint, file by file and tensor by "
                                     "tensor.", epilog="example: python export/verify.py runs/tiny/export/model")
    parser.add_argument("checkpoint", type=Path, help="folder of a model, or of a drafter alone")
    parser.add_argument("--against", type=Path, metavar="DIR", help="trained weights: experts must equal them bit for bit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found there")
    args = parser.parse_args(argv)
    for folder in (args.checkpoint, args.against):
        if folder is not None and not folder.is_dir():
            print(printable(f"error: {folder}: no such folder"), file=sys.stderr)
            return 2
    if args.json is not None and not args.json.absolute().parent.is_dir():
        print(f"error: --json {args.json}: no such folder {args.json.absolute().parent}", file=sys.stderr)
        return 2
    import torch

    from checkpoint.verify import verify
    from storage.files import write_json

    torch.set_num_threads(1)  # as in an export: threads take whole tensors, and do not share the arithmetic of one
    found = verify(args.checkpoint, args.against)
    groups = {"FOUND": found.wrong, "not checked": found.unchecked, "note": found.notes}
    if args.json is not None:
        write_json(args.json, {
            "checkpoint": str(args.checkpoint), "verdict": found.verdict, "layout": found.layout, "tensors": found.tensors,
            "bytes": found.bytes, "findings": found.findings, "unchecked": [str(f) for f in found.unchecked],
            "notes": [{"kind": f.kind, "text": f.text, "engines": f.engines} for f in found.notes]})
    for label, findings in groups.items():
        for finding in findings:
            print(f"{label}  {printable_line(finding)}")
    compared = ", experts equal to training" if args.against is not None and not found.wrong else ""
    verdict = counted(len(found.wrong), "finding") if found.wrong else f"whole{compared}"
    counts = {"not checked": len(found.unchecked), "notes": len(found.notes)}
    more = "".join(f", {count} {label}" for label, count in counts.items() if count)
    print(printable(f"{args.checkpoint}: {counted(found.tensors, 'tensor')}, {readable_size(found.bytes)}: {verdict}{more}"))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    own_lines_only()
    sys.exit(main(sys.argv[1:]))
