"""Environment variables that make a CPU faster. `import tritale` before torch sets them, unless the user did.

GOMP_SPINCOUNT: at the end of each parallel region a thread waits for the others. By default libgomp, which PyTorch's wheels carry and
native.c uses, spins for milliseconds. If another process has the core of the other thread, that is lost time at each of a step's fifty
regions (docs/log.md). After 30,000 iterations, about 0.3 ms, the thread sleeps: most gaps between the regions of a step are shorter.

THP_MEM_ALLOC_ENABLE: PyTorch asks Linux for pages of 2 MB in place of 4 KB for tensors of 2 MB and more. A product of matrices that are
larger than the cache is up to twice as fast in a virtual machine, where a missing page and a missing entry of the TLB cost most.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
