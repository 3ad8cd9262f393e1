"""What a GPU says about agentmem: is it right, what does it cost, does it train; one command, most valuable first.

    make gpu                                                    eight minutes on an NVIDIA GPU; sets up .venv first
    python -m benchmarks.gpu --minutes 8 --out build/gpu        the same with an environment that is there
    python -m benchmarks.gpu --device cpu --tiny                a rehearsal: every line of it, and no figure of use, two
                                                                parts at a time; without --device cpu a quick look on
                                                                a GPU

Every part runs in a process of its own, with a limit, and writes each result when it has it. So a part that fails,
hangs or is killed takes nothing from the others, and what is stopped half-way has said something. In the directory:

    results.json  table.txt         everything, and the table with its bars; renewed after each part
    PART.jsonl  PART.log            a part's results, one by one; what else it said
    scan_blocks.json                the fastest chunks of the scan: copy it to agentmem/kernels, or name it in
                                    AGENTMEM_SCAN_BLOCKS
    adapter/                        the adapter that was trained, with its card and log

The exit code is 0 where every bar was held, 1 where one was missed or a case or part failed, 2 where there is no GPU.
Of a rehearsal only what must be right counts; its times are shown as missed, with the three places where they go, and
count for nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The benchmarks' folder is no package: what is in it is imported by name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.command import main

if __name__ == "__main__":
    main(__doc__)
