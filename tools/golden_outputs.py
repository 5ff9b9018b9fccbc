"""Freezes what `make smoke` made, so that a refactoring can show that no number moved.

    make smoke && python tools/golden_outputs.py runs-smoke --write golden.json     # before
    make smoke && python tools/golden_outputs.py runs-smoke --check golden.json     # after, on the same machine

Bits depend on the processor and on torch, so the file is kept beside the change, not in the repository. Held: the SHA-256 of
every tensor of the trained models and of the export, its JSON files but for dates and paths, and the numbers of both summaries.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

CHANGING = ("seconds", "minutes", "date", "time", "path", "revision", "command", "rate", "version", "host", "_per_s", "wall",
            "fingerprint", "sha256", "digest", "speedup", "folder", "weights", "transformers")


def steady(value, key: str = ""):
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {k: steady(v, k) for k, v in value.items() if k != "sum" and not any(word in k for word in CHANGING)}
    return [steady(v) for v in value] if isinstance(value, list) else value


def golden(folder: Path) -> dict[str, str]:
    """Name -> digest or value, of all tensors and numbers below a smoke run's folder."""
    import torch
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" in path.parts:
            continue
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                found[f"{path.parent.relative_to(folder)}:{name}"] = (
                    f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}")
    for path in [*sorted(folder.rglob("summary.json")), *sorted(folder.rglob("export/**/*config.json"))]:
        found[str(path.relative_to(folder))] = json.dumps(steady(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of make smoke")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="store the golden outputs")
    what.add_argument("--check", type=Path, metavar="FILE", help="compare with stored ones; exit code 1 if one differs")
    options = parser.parse_args(argv)
    now = golden(options.folder)
    if options.write:
        options.write.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        print(f"{options.write}: {len(now)} outputs of {options.folder}")
        return 0
    before = json.loads(options.check.read_text(encoding="utf-8"))
    changed = sorted(key for key in before | now if before.get(key) != now.get(key))
    for key in changed[:40]:
        print(f"{key}: was {before.get(key, 'not there')[:400]}\n{'':4}now {now.get(key, 'not there')[:400]}")
    print(f"{len(changed)} of {len(before)} outputs differ")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
