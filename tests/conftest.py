"""Puts this folder on the import path, for the helpers that several test folders share.

One thread, here and in the processes that tests start: several add up in another order, which on some
processors shows in the fifth digit, and what a killed or divided run computes is compared exactly.
"""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, by this process and its children
gc.disable()  # nothing that is imported for the tests goes away again, and looking for it takes a tenth of the time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
