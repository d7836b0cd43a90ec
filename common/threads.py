"""OpenMP threads that do not waste a busy machine's cores. Importing this module before torch sets GOMP_SPINCOUNT.

At the end of each parallel region a thread waits for the others. By default libgomp, which PyTorch's wheels carry and native.c uses, spins
for milliseconds. If another process has the core of the other thread, that is lost time at each of a step's fifty regions
(docs/log.md). After 30,000 iterations, about 0.3 ms, the thread sleeps: most gaps between the regions of a step are shorter.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
