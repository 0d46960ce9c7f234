"""Kernels read and write raw memory, in threads: nothing but what was given to them, whatever else the process does.

Each test is a process of its own, most of them with an allocator that gives freed memory to the next who asks, from one
arena for all threads, and poisons it before.
"""

import os
import subprocess
import sys

import pytest

from mono_quant_hf.kernels import cpu

from .own_process import ROOT, finish, log_lines, run, start

pytestmark = [
    pytest.mark.skipif(cpu.load() is None, reason=f"no compiled kernels: {cpu.why_missing()}"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is that of glibc"),
]
POISON = {"MALLOC_ARENA_MAX": "1", "MALLOC_PERTURB_": "165"}

KERNELS = """
    FLOATS = (torch.float32, torch.bfloat16, torch.float16)

    def made(n, k):
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        scale, zero_point = torch.rand(n, 1), torch.randint(-128, 128, (n, 1), dtype=torch.int8)
        return codes, scale, zero_point, torch.randn(n), torch.randn(n, k).half(), torch.randn(n, k)

    def results(kernel, x, weights):
        codes, scale, zero_point, bias, half, floats = weights
        if kernel == "half":
            return linear(x, half, bias=bias)
        if kernel == "expand":
            return expand(codes, scale, zero_point)
        if kernel == "encode":
            return torch.cat([part.float().flatten() for part in quantize(floats)])
        with use_kernel(kernel):
            return linear(x, codes, scale, zero_point, bias.to(x.dtype), "int8" if kernel == "int8" else None)
"""


@pytest.mark.parametrize("kernel", ("float", "int16", "int8", "half", "expand", "encode"))
def test_every_call_gives_what_the_first_gave(kernel):
    run(
        KERNELS
        + f"""
    for n, k, calls in ((5, 33, 100), (512, 256, 50), (301, 1000, 20), (1030, 1100, 3)):
        weights = made(n, k)
        for tokens in (1, 3, 64) if {kernel!r} in ("float", "int16", "half") else (64,):
            for dtype in FLOATS:
                x = torch.randn(tokens, k).to(dtype)
                first = results({kernel!r}, x, weights)
                for _ in range(calls):
                    assert torch.equal(results({kernel!r}, x, weights), first), (n, k, tokens, dtype)
    """,
        **POISON,
    )


def test_a_thousand_products_in_two_threads():
    """What went wrong in a fifth of the calls while workers used memory that was freed."""
    run(
        KERNELS
        + """
    weights = made(512, 256)
    x = torch.randn(64, 256)
    for kernel in ("int16", "half"):
        first = results(kernel, x, weights)
        assert all(torch.equal(results(kernel, x, weights), first) for _ in range(1000))
    """,
        **POISON,
    )


@pytest.mark.parametrize("allocator", ({}, POISON), ids=("default allocator", "one arena"))
def test_eight_threads_share_a_layer_and_change_the_number_of_threads(allocator):
    run(
        KERNELS
        + """
    import threading
    weights = made(515, 320)
    torch.set_num_threads(1)
    wrong = []

    def product(kernel, x):
        codes, scale, zero_point, bias, half, _ = weights
        if kernel == "half":
            return linear(x, half, bias=bias)
        return linear(x, codes, scale, zero_point, bias, "int8" if kernel == "int8" else None)

    def work(kernel, x, expected, own):
        for i in range(20):
            torch.set_num_threads(1 + (own + i) % 3)
            if not torch.equal(product(kernel, x), expected):
                wrong.append((kernel, x.shape, x.dtype))

    for kernel in ("float", "int16", "int8", "half"):  # the setting is one for all threads
        with use_kernel("auto" if kernel == "half" else kernel):
            threads = []
            for own, tokens in enumerate((1, 2, 5, 17, 33, 64, 100, 130)):
                x = torch.randn(tokens, 320).to(FLOATS[own % 3])
                threads.append(threading.Thread(target=work, args=(kernel, x, product(kernel, x), own)))
            [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong, wrong
    """,
        **allocator,
    )


def test_the_numbers_are_the_same_by_one_thread_and_by_eight():
    code = (
        KERNELS
        + """
    import hashlib
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    weights = made(515, 640)
    digest = hashlib.sha256()
    for kernel in ("float", "int16", "int8", "half", "expand", "encode"):
        for tokens in (1, 40):
            digest.update(results(kernel, torch.randn(tokens, 640), weights).numpy())
    print(torch.get_num_threads(), digest.hexdigest())
    """
    )
    one, eight = (run(code, OMP_NUM_THREADS=threads).split()[-2:] for threads in ("1", "8"))
    assert (one[0], eight[0]) == ("1", "8")
    assert one[1] == eight[1]


def test_operands_at_the_end_of_their_page():
    """A read past an operand ends the process: the page behind it cannot be read."""
    run(
        KERNELS
        + """
    import ctypes, mmap, random
    libc = ctypes.CDLL(None, use_errno=True)

    def guarded(tensor):
        pages = -(-tensor.nbytes // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        end = pages * mmap.PAGESIZE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + end
        assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
        placed = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=end - tensor.nbytes)
        return placed.view(tensor.shape).copy_(tensor)

    random.seed(0)
    for _ in range(150):
        n, k, tokens = (random.randint(1, 70) for _ in range(3))
        k = k * 32 if random.random() < 0.2 else k
        plain = made(n, k)
        placed = [guarded(tensor) for tensor in plain]
        for dtype in FLOATS:
            x = torch.randn(tokens, k).to(dtype)
            for kernel in ("float", "int16", "int8", "half", "expand"):
                assert torch.equal(results(kernel, guarded(x), placed), results(kernel, x, plain)), (n, k, tokens)
    floats = torch.randn(515, 515)
    assert torch.equal(quantize(guarded(floats))[0], quantize(floats)[0])
    """
    )


def test_memory_does_not_grow():
    run(
        KERNELS
        + """
    import gc
    import itertools

    def resident():
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def short_calls(count):
        for _ in range(count):
            linear(x, codes, scale, zero_point, bias), linear(x, half)

    def loads(count):
        for _ in range(count):
            again = quantize(torch.randn(700, 700))
            linear(torch.randn(40, 700), *again), linear(torch.randn(700, 700), *again)

    codes, scale, zero_point, bias, half, _ = made(64, 64)
    x = torch.randn(2, 64)
    for use, count in ((short_calls, 10_000), (loads, 200)):
        use(count // 4)
        held = [resident()]
        for _ in range(3):  # an allocator settles, a leak grows in each round
            use(count)
            held.append(resident())
        assert min(after - before for before, after in itertools.pairwise(held)) < 4 << 20, (use.__name__, held)
    """
    )


def test_signals_between_and_inside_of_calls():
    """A handler that raises ends a call where it will; one that calls a kernel itself changes nobody's numbers."""
    run(
        KERNELS
        + """
    import signal
    weights, large = made(512, 256), made(515, 640)
    x = torch.randn(64, 256)
    first = {kernel: results(kernel, x, weights) for kernel in ("int16", "float", "int8", "half")}
    calls = stopped = 0

    class Stop(BaseException):
        pass

    def handler(number, frame):
        global calls
        calls += 1
        linear(torch.randn(1 + calls % 200, 640), *large[:3])
        if calls % 2:
            raise Stop

    signal.signal(signal.SIGALRM, handler)
    for attempt in range(200):
        kernel = list(first)[attempt % 4]
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0001 * (1 + attempt % 17))
            while calls <= attempt:
                assert torch.equal(results(kernel, x, weights), first[kernel]), kernel
        except Stop:
            stopped += 1
    assert stopped == 100
    for kernel in first:
        with use_kernel("auto"):
            assert torch.equal(results(kernel, x, weights), first[kernel])
    products()
    """,
        **POISON,
    )


# ---------------------------------------------------------------- the cache on disk

EIGHT_THREADS = """
    import threading
    failures = []

    def work():
        try:
            products()
        except BaseException as error:
            failures.append(error)

    def at_once():
        threads = [threading.Thread(target=work) for _ in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert not failures, failures
"""
INTERRUPTED = """
    import gc, signal, numba

    def handler(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.3)  # again, as what is raised in a callback of LLVM's is lost
    try:
        products()
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert gc.isenabled()
    # Again from this thread: an exception that a signal raises may fall between taking a lock of Numba's and the block
    # that gives it back, and other threads would wait for it.
    products()
"""


@pytest.fixture(scope="module")
def compiled_cache(tmp_path_factory):
    """Filled by two processes at once, each from eight threads, one of them interrupted in its first attempt."""
    folder = tmp_path_factory.mktemp("cache")
    settings = {"NUMBA_CACHE_DIR": str(folder)}
    processes = [
        start(EIGHT_THREADS + interruption + "\n    at_once()", **settings)
        for interruption in ("", INTERRUPTED)
    ]
    for process in processes:
        output = finish(process)
        ready = [line for line in log_lines(output) if "WARNING Compiling the CPU kernel" not in line]
        assert len(ready) == 4 and all("INFO" in line for line in ready)
    return folder


def files_of(folder):
    found = sorted(folder.rglob("*.nb[ci]"))
    assert found and not [path for path in folder.rglob("*") if "tmp" in path.name]
    return found


def products_with(folder):
    output = run("products()", NUMBA_CACHE_DIR=str(folder))
    return log_lines(output)


def test_what_threads_and_processes_compiled_at_once_is_read_afterwards(compiled_cache):
    assert all("read from the cache" in line for line in products_with(compiled_cache))


def test_what_processes_compiled_apart_goes_together(tmp_path):
    """Numba counts the functions of one name in each process from the start, and takes those of one count for one."""
    for entry in ("encode", "expand"):
        run(
            f"from mono_quant_hf.kernels import cpu; assert cpu.ready({entry!r})",
            NUMBA_CACHE_DIR=str(tmp_path),
        )
    run(
        """
        codes, scale, zero_point = quantize(values)
        assert torch.equal(expand(codes, scale, zero_point), (codes.float() - zero_point) * scale)
        """,
        NUMBA_CACHE_DIR=str(tmp_path),
    )


def test_damaged_files_are_compiled_again(compiled_cache):
    """Garbage, one bit, a file cut short, one that is empty: of code and of indexes."""
    damaged, left = ("codes.expand", "integers.linear_integers"), {}
    for path in files_of(compiled_cache):
        if path.name.rpartition("-")[0] in damaged:
            content = path.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            left[path] = (b"\0garbage" * 100, flipped, content[:middle], b"")[len(left)]
            path.write_bytes(left[path])
    assert len(left) == 4
    lines = products_with(compiled_cache)
    assert sum("compiled, and cached" in line for line in lines) == 2
    assert all(path.read_bytes() != content for path, content in left.items())
    assert all("read from the cache" in line for line in products_with(compiled_cache))


def test_a_disk_that_is_full(tmp_path):
    output = run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # of any file: what a full disk leaves, also for root
        products()
        """,
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    (line,) = (line for line in log_lines(output) if "WARNING Compiling" not in line)
    assert "WARNING" in line and "NUMBA_CACHE_DIR" in line
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


def test_a_compiler_that_is_switched_off():
    (line,) = log_lines(run("products()", NUMBA_DISABLE_JIT="1"))
    assert "WARNING" in line and "NUMBA_DISABLE_JIT" in line


def test_a_change_of_any_source_file_compiles_all_again(tmp_path):
    """Numba itself looks at the file of a function alone, not at those that it takes others from."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "cache.py").write_text((ROOT / "mono_quant_hf/kernels/compiled/cache.py").read_text())
    (folder / "part.py").write_text("import numba\n\n@numba.njit\ndef part():\n    return 1\n")
    (folder / "whole.py").write_text(
        "from kernels.cache import Cache\nfrom kernels.part import part\n\ncache = Cache()\n\n"
        "def whole():\n    return part()\n\nwhole = cache.compile('whole', whole, 'int64()')\n"
    )
    code = "from kernels.whole import cache, whole; print(cache.complete, whole())"

    def printed():
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()

    assert (printed(), printed()) == (["False", "1"], ["True", "1"])
    (folder / "part.py").write_text((folder / "part.py").read_text().replace("1", "2"))
    assert (printed(), printed()) == (["False", "2"], ["True", "2"])
    assert len(list(tmp_path.rglob("*.sha256"))) == 1
