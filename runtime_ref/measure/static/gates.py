"""Every kernel compiled ahead of time, on any machine, and held to its gates: what a GPU would only show as slowness.

The gates of the expert kernel at the geometry of one of eight ranks of MiMo-V2.5-Pro: nothing spilled to local
memory, weights loaded 128 bits at a time, tensor-core instructions present, at most 128 registers (four programs of 128
threads per multiprocessor, so that one's waiting is another's work) and at most 3.5 lane-instructions per weight in
both hot loops; at most 1 where the tensor cores read E2M1 themselves (`blackwell_mxfp4`, sm_100a). Other kernels must not
spill, the megakernels of a whole step included. Wherever packed words are decoded, four neighbouring bytes must lie in one
thread: the assembly takes them as one word, and which bytes meet in a word is the compiler's choice of layout. AMD
targets take the path without inline PTX and only have to compile.

Compilation says nothing about speed; the page it writes does not either.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from modeling.published_geometries import released_config
from runtime_ref.kernels.repack import Tile
from storage.files import write_text
from storage.revision import git_revision

LANE_INSTRUCTIONS, HW_FP4_LANE_INSTRUCTIONS = 3.5, 1.0
REGISTERS = 128
NVIDIA = {"sm_90a": 90, "sm_100a": 100}
AMD, AMD_HW_FP4 = ("gfx942", "gfx950"), "gfx950, hw_fp4"
WARPS = 4
HW_FP4_TILE = Tile(128, 256, hw_fp4=True)
# Rounded rows are bytes.
BYTES = {"x": "u8", "inner": "u8"}


@dataclass(frozen=True)
class Row:
    """One compiled kernel. Lane-instructions are those of the hot loops in program order (gate-up, then down); quads:
    the bytes of every packed word lie together (true where nothing is decoded). budget: lane-instructions per weight that are
    allowed, None for a kernel that must only not spill."""

    kernel: str
    target: str
    registers: int
    stack: int
    local_accesses: int
    wide_loads: int
    matrix_instructions: int
    lane_instructions: tuple[float, ...]
    quads: bool
    budget: float | None

    def faults(self) -> list[str]:
        """The gates that this kernel misses, in words."""
        where = f"{self.kernel} for {self.target}"
        found = []
        if self.stack or self.local_accesses:
            found.append(f"{where}: spills ({self.stack} bytes of stack, {self.local_accesses} local accesses), expected none")
        if not self.quads:
            found.append(f"{where}: bytes of a packed word lie in different threads or apart")
        if self.budget is None:
            return found
        if not self.wide_loads:
            found.append(f"{where}: no 128-bit load")
        if not self.matrix_instructions:
            found.append(f"{where}: no tensor-core instruction")
        if self.registers > REGISTERS:
            found.append(f"{where}: {self.registers} registers, expected at most {REGISTERS}")
        if len(self.lane_instructions) != 2 or max(self.lane_instructions) > self.budget:
            found.append(f"{where}: {self.lane_instructions} lane-instructions per weight, expected two hot loops of at most "
                         f"{self.budget}")
        return found


def experts_constants(tokens: int, tile: Tile, *, tickets: bool, ptx: bool, config: dict | None = None, ranks: int = 8,
                      chunk_tiles: int = 4, packed: bool = True, ahead: int = 0) -> dict:
    """Compile-time arguments of the expert kernel for one rank's shard."""
    config = config or released_config("MiMo-V2.5-Pro")
    inner, choices = config["moe_intermediate_size"] // ranks, config["num_experts_per_tok"]
    return {"A": choices, "M": max(16, 1 << (tokens * choices - 1).bit_length()), "UP": -(-inner // (tile.rows // 2)),
            "DOWN": -(-config["hidden_size"] // (tile.rows * chunk_tiles)), "TILES": chunk_tiles,
            "K_DOWN": -(-inner // tile.depth), "PARTS": 1, "KEEP": False, "UP_ROWS": tile.rows,
            "UP_DEPTH": tile.depth, "DOWN_ROWS": tile.rows,
            "DOWN_DEPTH": tile.depth, "EVEN": config["hidden_size"] % tile.depth == 0, "STAGES": 3, "PREFETCH": 16384,
            "TICKETS": tickets, "WAIT": True, "POLL_LIMIT": 1 << 22, "PTX": ptx, "FLOAT_DOT": False, "PHASE": 0,
            "RESIDUAL": False, "HW_FP4": tile.hw_fp4, "PACKED": packed, "AHEAD": ahead}


def compile_kernel(kernel, constants: dict, target, changed: dict[str, str] | None = None, **options):
    """Compiles a kernel for a `GPUTarget`; pointers and some sizes are promised to be multiples of 16, those of a launch.

    Args:
        changed: types of pointers that differ from the usual ones.
    """
    from triton.compiler import ASTSource, compile

    from runtime_ref.measure.static.kernel_arguments import ALIGNED, FLOATS, POINTERS, ROW_POINTERS

    names, pointers = kernel.arg_names, POINTERS | ROW_POINTERS | (changed or {})
    assert constants.keys() <= set(names), constants.keys() - set(names)
    types = {name: f"*{pointers[name]}" if name in pointers else "fp32" if name in FLOATS else "i32" for name in names}
    types |= {name: "constexpr" for name in constants} | ({"out": "*fp32"} if {"buffers", "out"} <= set(names) else {})
    sizes = {p.name for p in kernel.params if not p.do_not_specialize} & set(ALIGNED)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if types[name].startswith("*") or types[name] != "constexpr" and name in sizes}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return compile(source, target=target, options=options)


def _nvidia_row(name: str, target: str, kernel, constants: dict, tile: Tile | None, changed: dict | None = None,
                **options) -> Row:
    from triton.backends.compiler import GPUTarget

    from runtime_ref.measure.static.sass import read_binary

    options = {"num_warps": WARPS} | options
    compiled = compile_kernel(kernel, constants, GPUTarget("cuda", NVIDIA[target], 32), changed, **options).asm
    binary = read_binary(compiled["cubin"])
    lanes = tuple(round(loop.length * WARPS * 32 / (tile.rows * tile.depth), 2) for loop in binary.hot_loops()) if tile else ()
    budget = None if tile is None else HW_FP4_LANE_INSTRUCTIONS if tile.hw_fp4 else LANE_INSTRUCTIONS
    return Row(name, target, binary.registers, binary.stack, binary.local_accesses, binary.wide_loads,
               binary.matrix_instructions, lanes, quads_together(compiled["ttgir"]), budget)


def quads_together(ttgir: str) -> bool:
    """Whether every decoding assembly sees four neighbouring bytes of a row in consecutive registers of a thread.

    Args:
        ttgir: Triton's GPU IR: layouts of operands are `kWidth` (matrix operands) or `sizePerThread` (blocked).
    """
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    for line in ttgir.splitlines():
        if "elementwise_inline_asm" not in line or "bf16x2" not in line:
            continue
        codes = re.search(r"tensor<\d+x\d+xi8, (#[\w.]+(?:<\{.*?\}>)?)>", line)
        layout = layouts.get(codes[1], codes[1])
        width = re.search(r"kWidth = (\d+)", layout)
        blocked = re.search(r"sizePerThread = \[\d+, (\d+)\].*order = \[1, 0\]", layout)
        found = width or blocked
        if not found or int(found[1]) % 4:
            return False
    return True


def rows() -> list[Row]:
    """Compiles everything for every NVIDIA target."""
    from runtime_ref.kernels import attention, experts, sync
    from runtime_ref.kernels import mxfp4_decode as decode
    from runtime_ref.kernels.experimental import blackwell_mxfp4 as blackwell_mxfp4
    from runtime_ref.kernels.experimental import megakernel as step
    from runtime_ref.kernels.experimental.megakernel import Tuning
    from runtime_ref.measure.gpu_suite import suite as gpu_suite
    from runtime_ref.measure.static.kernel_arguments import draft_constants, small_kernels, step_constants

    found, tile = [], Tile()
    for tokens in (8, 64):
        constants = experts_constants(tokens, HW_FP4_TILE, tickets=True, ptx=True)
        found.append(_nvidia_row(f"experts_kernel, {tokens} tokens, hw_fp4", "sm_100a", experts.experts_kernel, constants,
                                 HW_FP4_TILE, BYTES))
    found.append(_nvidia_row("round_rows_kernel", "sm_100a", blackwell_mxfp4.round_rows_kernel, {"BLOCKS": 32}, None,
                             {"out": "u8"}))
    for target in NVIDIA:
        for tokens in (8, 64):
            for tickets in (True, False):
                name = f"experts_kernel, {tokens} tokens, {'tickets' if tickets else 'static order'}"
                constants = experts_constants(tokens, tile, tickets=tickets, ptx=True)
                found.append(_nvidia_row(name, target, experts.experts_kernel, constants, tile,
                                         launch_cooperative_grid=not tickets))
        for name, switch in {"a slot a choice": {"packed": False}, "4 KB ahead": {"ahead": 4096}}.items():
            constants = experts_constants(8, tile, tickets=True, ptx=True, **switch)
            found.append(_nvidia_row(f"experts_kernel, 8 tokens, tickets, {name}", target, experts.experts_kernel, constants,
                                     tile))
        plain = {"all_reduce_rows, 8 ranks": (sync.all_reduce_rows, {"RANKS": 8, "BLOCK": 512, "POLLS": 1 << 22}),
                 "decode_kernel": (decode.decode_kernel, {"ROWS": 64, "DEPTH": 256, "PTX": True}),
                 "read_kernel": (gpu_suite.read_kernel, {"BLOCK": 16384})}
        for window in (None, 128):
            constants = attention.attention_constants(1, 16, 8, 192, 128, window, sink=window is not None)
            name = f"attend_kernel, 8 tokens, {f'window {window}, sinks' if window else 'all positions'}"
            found.append(_nvidia_row(name, target, attention.attend_kernel, constants, None, num_warps=8))
        found += [_nvidia_row(name, target, kernel, constants, None) for name, (kernel, constants) in plain.items()]
        found += [_nvidia_row(name, target, kernel, constants, None, changed)
                  for name, (kernel, constants, changed) in small_kernels().items()]
        constants = attention.attention_constants(1, 16, 8, 192, 128, 128, sink=True, draft=True)
        found.append(_nvidia_row("attend_kernel, draft block of 8", target, attention.attend_kernel, constants, None,
                                 num_warps=8))
        shapes = experts_constants(8, tile, tickets=False, ptx=True)
        deep = shapes | {"STAGES": step.STAGES}
        tuned = Tuning(release_flag=True, ahead=4096, packed=False)
        megakernels = {"8 tokens, sums over 8 ranks": step_constants(deep, 8),
                       "drafter, block of 8, sums over 8 ranks": draft_constants(shapes, 8),
                       "8 tokens, sums over 8 ranks, all switches": step_constants(deep, 8, tuned)}
        if target == "sm_90a":  # what one Hopper GPU runs of a rank
            megakernels["8 tokens"] = step_constants(deep, 1)
        for name, constants in megakernels.items():
            found.append(_nvidia_row(f"step_kernel, {name}", target, step.step_kernel, constants, None,
                                     **step.launch_options(interpreted=False)))
    return found


def compile_amd() -> dict[str, int]:
    """Bytes of the expert kernel's binary for each AMD target: integer decoding, and hw_fp4 pages where it has the product."""
    from triton.backends.compiler import GPUTarget

    from runtime_ref.kernels.experts import experts_kernel

    def size(arch: str, tile: Tile, changed: dict[str, str] | None = None) -> int:
        constants = experts_constants(8, tile, tickets=True, ptx=False)
        return len(compile_kernel(experts_kernel, constants, GPUTarget("hip", arch, 64), changed, num_warps=WARPS).asm["hsaco"])

    return {arch: size(arch, Tile()) for arch in AMD} | {AMD_HW_FP4: size("gfx950", HW_FP4_TILE, BYTES)}


def run(*, json_path: Path | None, page_path: Path | None) -> int:
    """`bench.py --static`: prints the table, writes it where asked; 1 if a gate is missed.

    Raises:
        ValueError: triton is missing, or its interpreter is switched on.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--static: triton is not installed; expected `pip install -e '.[gpu]'` (Linux)")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("--static: TRITON_INTERPRET=1 is set; expected it unset, since the interpreter compiles nothing")
    import triton

    table, amd = rows(), compile_amd()
    faults = [fault for row in table for fault in row.faults()]
    facts = {"triton": triton.__version__, "python": platform.python_version(), "date": datetime.date.today().isoformat(),
             "revision": git_revision(),
             "gates": {"lane_instructions": LANE_INSTRUCTIONS, "registers": REGISTERS}, "faults": faults, "amd_bytes": amd}
    print(text := as_table(table))
    print("\n".join(faults) or "all gates hold")
    if json_path:
        write_text(json_path, json.dumps(facts | {"kernels": [asdict(row) for row in table]}, indent=1) + "\n")
    if page_path:
        write_text(page_path, _page(text, facts))
    return 1 if faults else 0


def as_table(table: list[Row]) -> str:
    lines = ["| kernel | target | registers | stack | local accesses | 128-bit loads in hot loops | tensor-core instructions | "
             "lane-instructions per weight (gate-up, down) |", "|---|---|---|---|---|---|---|---|"]
    for row in table:
        lanes = ", ".join(f"{value:.2f}" for value in row.lane_instructions) or "-"
        cells = (row.kernel, row.target, row.registers, row.stack, row.local_accesses, row.wide_loads, row.matrix_instructions,
                 lanes)
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def _page(table: str, facts: dict) -> str:
    amd = ", ".join(f"{arch} ({size:,} bytes)" for arch, size in facts["amd_bytes"].items())
    verdict = "All gates hold." if not facts["faults"] else "Missed: " + "; ".join(facts["faults"]) + "."
    return f"""# The kernels as compiled, without a GPU

Ahead-of-time compilation with triton {facts['triton']}, {facts['date']}, revision
{facts['revision']}. Nothing on this page was measured on a GPU: it is what the compiler made, read from the binaries.
Written, with [kernels-static.json](kernels-static.json), by

    python runtime_ref/bench.py --static --json docs/results/kernels-static.json --page docs/results/kernels-static.md

The expert kernel has the shape of one of eight ranks of MiMo-V2.5-Pro (384 experts, 6144 -> 256 -> 6144), 64 x 256 pages, four
warps. Its gates: no spills, 128-bit weight loads, tensor-core instructions, at most {REGISTERS} registers (four programs per
multiprocessor), at most {LANE_INSTRUCTIONS} lane-instructions per weight in both hot loops. No other kernel may spill either.
"hw_fp4" is the path for tensor cores that read E2M1 themselves (`tl.dot_scaled`, activations in MXFP8): 128 x 256 pages, at
most {HW_FP4_LANE_INSTRUCTIONS:g} lane-instruction per weight. Its weights are copied 64 bits at a time, 16 values, which those
tensor cores want padded to 16 bytes; the 128-bit loads are of activations. It changes numbers, so it is taken only where it is
asked for.
"A slot a choice", "4 KB ahead" and "all switches" (those two, and barriers with a release flag) are switches for a GPU to
choose among (`Launch`, `Tuning`); they are held to the same gates.
{verdict}

{table}

Lane-instructions per weight count every instruction of the hot loop (loads, decoding, matrix products, loop control) for every
lane of the program, over the weights of one turn. A memory-bound H200 leaves 3.70 at full bandwidth, a B200 2.33
(`bench.py --roofline`). The path without inline PTX also compiles for {amd}.
"""
