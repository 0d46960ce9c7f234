"""What surrounds a product: who chooses, threads, forks, a missing Numba, a cache that cannot be written."""

import os
import textwrap
import threading

import pytest
import torch

from mono_quant_hf.kernels import KERNELS, Choice, choose, cpu, get_kernel, linear, set_kernel, use_kernel

from .own_process import log_lines, run
from .test_linear import close, codes

COMPILED = cpu.load()
X86 = COMPILED is not None and COMPILED.X86
needs_compiled = pytest.mark.skipif(COMPILED is None, reason="no compiled kernels here")


def test_the_choice_is_told_with_its_reason():
    weight, _, _ = codes(6, 8)
    half = weight.half()
    for tokens in (1, 2, 1000):
        for w in (weight, half):
            choice = choose(torch.ones(tokens, 8), w)
            assert isinstance(choice, Choice)
            assert choice.name in KERNELS[1:]
            assert choice.reason
    assert choose(torch.ones(1, 8, dtype=torch.float64), weight) == Choice("portable", "x is torch.float64")
    assert choose(torch.ones(0, 8), weight).name == "portable"


@needs_compiled
def test_the_choice_by_shape():
    weight = codes(128, 64)[0]
    assert choose(torch.ones(1, 64), weight).name == ("float" if COMPILED.STREAMS_FLOATS else "int16")
    assert choose(torch.ones(4, 64), weight).name == "int16"
    assert choose(torch.ones(4, 64), weight[:64]).name == "float"  # small
    assert choose(torch.ones(4, 64), weight[:, ::2]).name == "blocks"
    if COMPILED.HALF:
        assert choose(torch.ones(1, 64), weight.half()).name == "float"
        assert choose(torch.ones(1000, 64), weight.half()).name == "float"


def test_the_setting():
    assert get_kernel() == "auto"
    weight = codes(6, 8)[0]
    with use_kernel("portable"):
        assert choose(torch.ones(1, 8), weight) == Choice("portable", "it was asked for")
        with pytest.raises(RuntimeError), use_kernel("blocks"):
            raise RuntimeError
        assert get_kernel() == "portable"
    assert get_kernel() == "auto"
    with pytest.raises(ValueError, match="one of auto, int16, float, blocks, portable"):
        set_kernel("cuda")


def test_the_setting_in_the_environment():
    output = run("print(choose(torch.ones(1, 512), weight).name)", MONO_QUANT_KERNEL="blocks")
    assert output.split() == ["blocks"]
    with pytest.raises(AssertionError, match="MONO_QUANT_KERNEL is 'fast'"):
        run("", MONO_QUANT_KERNEL="fast")


@pytest.mark.parametrize(
    ("numba", "reason"),
    (("None", "cannot be imported"), ("types.ModuleType('numba')", "cannot compile them here")),
    ids=("missing", "half imported"),
)
def test_without_numba_one_line_says_so(numba, reason):
    output = run(
        f"""
        sys.modules["numba"] = {numba}
        products()
        assert choose(torch.ones(1, 512), weight).name == "blocks"
        """
    )
    (line,) = log_lines(output)
    assert "WARNING" in line and reason in line


def test_numba_is_imported_only_when_a_product_needs_it():
    run("assert 'numba' not in sys.modules\nproducts()")


VECTORS = """
    from mono_quant_hf.kernels import compiled, use_kernel
    products()
    with use_kernel("int8"):
        x = torch.randn(40, 512)
        exact = x.double() @ expand(weight, scale, zero_point, dtype=torch.float64).T
        error = linear(x, weight, scale, zero_point, activations="int8") - exact
        assert error.norm() / exact.norm() < 0.02
    print("BYTES", compiled.VECTOR_BYTES, compiled.HALF, compiled.BYTE_PRODUCTS)
"""


@needs_compiled
@pytest.mark.skipif(not X86, reason="names x86 processors")
def test_compiled_once_then_read_from_the_cache(tmp_path):
    """For a processor that decides the vectors: 8 lanes, with VNNI in the form of desktops where this one has it."""
    from llvmlite import binding

    units = binding.get_host_cpu_features().get("avxvnni", False)
    features = "+avx2,+avx,+fma,+f16c" + units * ",+avxvnni"
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    first = run(VECTORS, NUMBA_CACHE_DIR=str(tmp_path), **older)
    lines = log_lines(first)
    assert all("WARNING Compiling the CPU kernel" in said for said in lines[::2])
    assert len(lines) == 2 * 4 and all("compiled, and cached" in done for done in lines[1::2])
    assert f"BYTES 32 True {units}" in first
    assert list(tmp_path.rglob("*.nbi"))
    second = run(VECTORS, NUMBA_CACHE_DIR=str(tmp_path), **older)
    assert len(log_lines(second)) == 4 and all("read from the cache" in line for line in log_lines(second))


@needs_compiled
@pytest.mark.skipif(not X86, reason="names x86 processors")
def test_no_cache_that_can_be_written():
    """For the oldest processor: 4 lanes, and no float16."""
    nowhere = """
        from numba.core import caching
        caching.CacheImpl._locator_classes = []  # what a read-only disk leaves, also for root
    """
    output = run(
        textwrap.dedent(nowhere) + textwrap.dedent(VECTORS),
        NUMBA_CPU_NAME="x86-64",
        NUMBA_CPU_FEATURES="+sse2",
    )
    assert "BYTES 16 False False" in output
    *announced, line = [line for line in log_lines(output) if "Compiling" not in line or "anew" in line]
    assert not announced and "WARNING" in line and "NUMBA_CACHE_DIR" in line


FORKED = """
    {first}
    child = os.fork()
    if child == 0:
        products()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    products()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@needs_compiled
@pytest.mark.parametrize("first", ("products()", "torch.randn(512, 512) @ torch.randn(512, 512)"))
def test_after_a_fork(first):
    """Used before the fork, or only torch's threads used: either way the child has no thread to wait for."""
    run(FORKED.format(first=first), timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_data_loader_workers():
    run(
        """
        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                products()
                return linear(torch.ones(1, 512), weight, scale, zero_point)[0]

        products()
        loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork")
        rows = torch.cat(list(loader))
        assert torch.allclose(rows, linear(torch.ones(1, 512), weight, scale, zero_point).expand(8, 512))
        """,
        timeout=120,
    )


def test_from_several_threads_at_once():
    weight, scale, zero_point = codes(256, 320)
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for tokens in (1, 3, 1, 20, 1):
                x = torch.randn(tokens, 320, generator=generator)
                close(linear(x, weight, scale, zero_point), x, weight, scale, zero_point)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_compiled
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_as_many_threads_as_torch_is_told(threads, monkeypatch):
    asked = []
    original = cpu._threads
    monkeypatch.setattr(cpu, "_threads", lambda: asked.append(original()) or asked[-1])
    before = torch.get_num_threads()
    weight, scale, zero_point = codes(512, 512)
    try:
        torch.set_num_threads(threads)
        for tokens in (1, 8):
            x = torch.randn(tokens, 512)
            close(linear(x, weight, scale, zero_point), x, weight, scale, zero_point)
    finally:
        torch.set_num_threads(before)
    assert set(asked) == {threads}


@needs_compiled
def test_the_result_does_not_depend_on_the_threads():
    weight, scale, zero_point = codes(512, 512)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x = torch.randn(8, 512, generator=torch.Generator().manual_seed(3))
            results.append((linear(x, weight, scale, zero_point), linear(x[:1], weight, scale, zero_point)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@needs_compiled
@pytest.mark.parametrize("layer", ("workqueue", "default"))
def test_numbas_threads_where_torchs_cannot_be_had(layer):
    run(
        """
        import threading
        from mono_quant_hf.kernels import cpu
        cpu._launcher_of_torch = lambda: 0
        products()
        threads = [threading.Thread(target=products) for _ in range(3)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        """,
        NUMBA_THREADING_LAYER=layer,
    )
