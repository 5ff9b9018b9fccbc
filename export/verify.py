#!/usr/bin/env python
"""Verifies an exported checkpoint from disk: `python export/verify.py CHECKPOINT_DIR [--against TRAINING_DIR] [--json FILE]`.

Every finding is printed in one run, with the tensor or file it is about; `export.inspection` says what is checked. Exit code:
0 nothing found, 1 findings, 2 a mistake in the arguments.
"""

import argparse
import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where export/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from storage.terminal import printable, printable_line


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="export/verify.py", description="Verify an exported checkpoint, file by file and "
                                     "tensor by tensor.", epilog="example: python export/verify.py runs/tiny/export/model")
    parser.add_argument("checkpoint", type=Path, help="folder written by export/to_hf.py")
    parser.add_argument("--against", type=Path, metavar="DIR", help="trained weights: experts must equal them bit for bit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings there")
    args = parser.parse_args(argv)
    for folder in (args.checkpoint, args.against):
        if folder is not None and not folder.is_dir():
            print(printable(f"error: {folder}: no such folder"), file=sys.stderr)
            return 2
    if args.json is not None and not args.json.absolute().parent.is_dir():
        print(f"error: --json {args.json}: no such folder {args.json.absolute().parent}", file=sys.stderr)
        return 2
    import torch

    from export.config_files import write_json
    from export.inspection import Checkpoint

    torch.set_num_threads(1)  # as in an export: threads take whole tensors, and do not share the arithmetic of one
    checkpoint = Checkpoint(args.checkpoint, args.against)
    findings = checkpoint.run()
    if args.json is not None:
        write_json(args.json, {"checkpoint": str(args.checkpoint), "tensors": checkpoint.tensors, "bytes": checkpoint.bytes,
                               "findings": findings})
    for finding in findings:
        print(f"FOUND  {printable_line(finding)}")
    compared = ", experts equal to training" if args.against is not None and not findings else ""
    verdict = f"{len(findings)} findings" if findings else f"whole{compared}"
    print(printable(args.checkpoint), f": {checkpoint.tensors:,} tensors, {checkpoint.bytes / 1e9:.3f} GB: {verdict}", sep="")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
