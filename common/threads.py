"""OpenMP threads that do not waste a busy machine's processors. Importing this module before torch sets GOMP_SPINCOUNT.

At the end of each parallel region a thread waits for the others. By default libgomp, which PyTorch's wheels carry and native.c uses, spins
for milliseconds. If another process has the processor of the other thread, that is lost time at each of a step's fifty regions
(docs/log.md). A limit of 100 turns, about 1 µs, is enough on an idle machine; after it the thread sleeps.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100")
