"""The inner loops, compiled by Numba for the processor they run on. Imported by `cpu.load` alone.

From the bottom up:

1. a *tile* of products is kept in registers (tiles.py), by instructions that Numba has no words for (instructions.py);
2. a *pass* takes chunks of rows, tokens or columns off a shared counter until none are left, in each thread; all
   scratch stands in one workspace (workspace.py);
3. an *entry* is what Python calls: it runs passes, is one function in Numba's cache (cache.py), and is compiled when it
   is first asked for.
"""

from .codes import encode, expand
from .floats import linear_floats
from .instructions import CACHE
from .integers import BYTE_PRODUCTS, LONGEST_OF_BYTES, linear_integers
from .tiles import HALF, INTEGER_UNITS, STREAMS_FLOATS, VECTOR_BYTES, X86

__all__ = [
    "BYTE_PRODUCTS",
    "CACHE",
    "ENTRIES",
    "HALF",
    "INTEGER_UNITS",
    "LONGEST_OF_BYTES",
    "STREAMS_FLOATS",
    "VECTOR_BYTES",
    "X86",
]
ENTRIES = {
    "float": linear_floats,
    "int16": linear_integers,
    "int8": linear_integers,
    "expand": expand,
    "encode": encode,
}
