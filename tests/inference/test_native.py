"""The layers from C++ give the bits of those from Python; without a compiler, or a whole library, Python runs."""

import copy
import itertools
import os

import pytest
import torch

from tests.conftest import THOROUGH
from tests.inference.conftest import make_causal_lm
from tests.programs import call
from tidar_megatron.errors import UserError
from tidar_megatron.files import sha256_of
from tidar_megatron.inference import native, quantizing
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.draft_weights import DraftWeights, Pair
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.lean import use_lean_forward
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.products import laid_out, of_library, packed, plain
from tidar_megatron.inference.quantized import int8_product, to_int8
from tidar_megatron.inference.quantizing import quantize_model
from tidar_megatron.inference.wrapping import wrap_model


def needs_own_kernels(library, dtype):
    if not library.has_own_kernels(dtype):
        pytest.skip(f"this processor cannot run the kernels of {dtype}: it lacks AVX-512, or AVX512-BF16")


LAYOUTS = [ForwardLayout(1), ForwardLayout(5, (1, 3), 4)]
FAMILIES, DTYPES = ("llama", "mistral", "qwen2", "qwen3"), (torch.float32, torch.bfloat16)
FORMS = ("plain", "laid out", "int8", "int4")
ALL = [*itertools.product(FAMILIES, DTYPES, FORMS), *((family, torch.float16, "plain") for family in FAMILIES)]
CASES = [("llama", torch.float32, "plain")]  # named where none runs
SIZES = {"hidden_size": 64, "intermediate_size": 96}
compiles = pytest.mark.skipif(not THOROUGH, reason="takes a minute, to compile: .ci/run runs it")


@pytest.fixture
def forget(monkeypatch, tmp_path):
    """A cache of the test's own, without a library."""
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("compiled"), os.environ["TIDAR_CACHE"]
    os.environ["TIDAR_CACHE"] = str(folder)
    native.library.cache_clear()
    umask = os.umask(0o002)  # usual where each user has a group: the library must be loaded there too
    native.compile_library()
    os.umask(umask)
    yield native.library()
    os.environ["TIDAR_CACHE"] = before
    native.library.cache_clear()


def hidden(model, layout):
    pool = KVPool(1, 100)
    with torch.inference_mode():
        model.forward(PackedForward(pool, [Part(0, 0, range(1, 11), ForwardLayout(10))]))
        return model.forward(PackedForward(pool, [Part(0, 10, range(layout.num_drafts), layout)]))


def model_of(causal_lm, form, library, monkeypatch):
    model = wrap_model(copy.deepcopy(causal_lm))
    if form in ("int8", "int4"):
        monkeypatch.setattr(quantizing, "library", lambda: library)
        quantize_model(model, form)
    else:
        monkeypatch.setattr("tidar_megatron.inference.lean.SMALL", 0)
        product_of = {"plain": plain, "laid out": packed, "own": laid_out}[form]
        use_lean_forward(model, take=True, product_of=product_of, library=library)
    return model


@compiles
@pytest.mark.process
@pytest.mark.parametrize(("family", "dtype", "form"), ALL if THOROUGH else CASES)
def test_bits_are_those_of_python(library, family, dtype, form, monkeypatch):
    torch.manual_seed(0)
    causal_lm = make_causal_lm(family, dtype, **SIZES)
    with torch.no_grad():
        for name, weight in causal_lm.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                weight.normal_(1, 0.3)
    ours, theirs = (model_of(causal_lm, form, calls, monkeypatch) for calls in (library, None))
    assert ours.lean.is_compiled and not theirs.lean.is_compiled
    for layout in LAYOUTS:
        found = hidden(ours, layout)
        assert found.isfinite().all() and torch.equal(found, hidden(theirs, layout))


@compiles
@pytest.mark.process
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 2), (48, 64), (96, 576), (640, 1536), (64, 4096)], ids=str)
def test_own_products(library, outputs, inputs, bias, dtype):
    """Against float64, rounded once; a row has the same bits however many rows there are, adjacent or not."""
    needs_own_kernels(library, dtype)
    draw = torch.Generator().manual_seed(outputs)
    weight, rows, more, residual = (
        torch.randn(size, generator=draw).to(dtype)
        for size in ((outputs, inputs), (61, inputs), (outputs,), (61, outputs))
    )
    product = of_library(library)(weight, more if bias else None)
    assert product.kernel.name == "own"
    exact = rows.double() @ weight.double().t() + (more.double() if bias else 0)
    found, added = product.of(rows), product.added(residual, rows)
    scale, eps = exact.abs().max(), torch.finfo(dtype).eps
    rounding = (exact.to(dtype).double() - exact).abs().mean()
    assert (found.double() - exact).abs().max() < (eps if dtype == torch.bfloat16 else 64 * eps) * scale
    assert (added.double() - exact - residual.double()).abs().max() < (2 * eps + 8e-6) * scale
    assert (found.double() - exact).abs().mean() < 1.01 * rounding + 1e-6 * scale
    apart = torch.cat([rows, rows], -1)[:, :inputs]  # rows with a gap between them
    for count in (*range(1, 27), 36, 48, 60):
        assert torch.equal(product.of(rows[:count]), found[:count])
        assert torch.equal(product.of(apart[:count]), found[:count])
        assert torch.equal(product.added(residual[:count], rows[:count]), added[:count])


@compiles
@pytest.mark.process
@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_with_own_products_are_those_of_others(library, family, monkeypatch):
    """Up to rounding; what the product does not fit is laid out for oneDNN."""
    causal_lm = make_causal_lm(family, torch.bfloat16, **SIZES)
    ours, theirs = (model_of(causal_lm, "own", calls, monkeypatch) for calls in (library, None))
    names = {product.kernel.name for layer in ours.lean._layers for product in layer.products}
    assert names == ({"own"} if library.has_own_kernels(torch.bfloat16) else {"packed"})
    for layout in LAYOUTS:
        found, wanted = hidden(ours, layout).float(), hidden(theirs, layout).float()
        assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    for weight in (torch.zeros(17, 64), torch.zeros(64, 63), torch.zeros(16, 4098)):
        assert of_library(library)(weight.bfloat16(), None).kernel.name == "packed"
        assert of_library(library)(weight, None).kernel.name == "packed"


def states(model, parts):
    """The hidden states of parts, whose sequences have the keys of other tokens before them."""
    pool = KVPool(max(part.slot for part in parts) + 1, 400)
    with torch.inference_mode():
        for part in parts:
            before = [token % 19 for token in range(part.length)] or [1]
            model.forward(PackedForward(pool, [Part(part.slot, 0, before, ForwardLayout(len(before)))]))
        out = model.forward(PackedForward(pool, parts))
    return out.split([part.layout.num_tokens for part in parts])


@compiles
@pytest.mark.process
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_own_layers_are_exact_to_rounding(library, family, head_dim, dtype, monkeypatch):
    """Against the modules in float64: no further from them than the calls of Python, which round more often."""
    needs_own_kernels(library, dtype)
    causal_lm = make_causal_lm(family, dtype, **SIZES, head_dim=head_dim)
    with torch.no_grad():
        for name, weight in causal_lm.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                weight.normal_(1, 0.3)
    ours, theirs = (model_of(causal_lm, "own", calls, monkeypatch) for calls in (library, None))
    exact = wrap_model(copy.deepcopy(causal_lm).double())
    assert ours.lean._is_own and not theirs.lean._is_own
    errors = []
    for length, layout in ((0, ForwardLayout(1)), (70, ForwardLayout(5, (1, 3), 4)), (201, ForwardLayout(40))):
        part = [Part(0, length, [token % 17 for token in range(layout.num_drafts)], layout)]
        found, wanted, other = (states(model, part)[0].double() for model in (ours, exact, theirs))
        assert (found - wanted).abs().max() < (12 if dtype == torch.bfloat16 else 64) * torch.finfo(
            dtype
        ).eps * wanted.abs().max()
        errors.append(torch.stack([(found - wanted).abs().flatten(), (other - wanted).abs().flatten()]))
    mean, mean_of_python = torch.cat(errors, 1).mean(1)
    assert mean < (1.05 if dtype == torch.bfloat16 else 2) * mean_of_python


@compiles
@pytest.mark.process
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_attention_does_not_hide_nan(library, dtype, monkeypatch):
    needs_own_kernels(library, dtype)
    model = model_of(make_causal_lm("llama", dtype, **SIZES, head_dim=32), "own", library, monkeypatch)
    pool = KVPool(1, 100)
    with torch.inference_mode():
        model.forward(PackedForward(pool, [Part(0, 0, range(10), ForwardLayout(10))]))
        pool._layers[0][0][0, :, 3, 0] = torch.nan  # a key
        assert model.forward(PackedForward(pool, [Part(0, 10, range(3), ForwardLayout(3))])).isnan().all()
    with pytest.raises(AssertionError):  # more tokens than there is room for
        model.forward(PackedForward(pool, [Part(0, pool.capacity - 2, range(3), ForwardLayout(3))]))


@compiles
@pytest.mark.process
@pytest.mark.parametrize(
    "change", [{"head_dim": 16}, {"head_dim": 272}, {"intermediate_size": 88, "head_dim": 32}], ids=str
)
def test_sizes_that_own_kernels_do_not_fit(library, change, monkeypatch):
    """Such layers run by calls, with the same result up to rounding."""
    causal_lm = make_causal_lm("llama", torch.float32, **{**SIZES, **change})
    ours, theirs = (model_of(causal_lm, "own", calls, monkeypatch) for calls in (library, None))
    assert ours.lean.is_compiled and not ours.lean._is_own
    for layout in LAYOUTS:
        assert torch.allclose(hidden(ours, layout), hidden(theirs, layout), atol=1e-5)


@compiles
@pytest.mark.process
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_of_own_layers_do_not_depend_on_others(library, family, dtype, monkeypatch):
    """A clean token has the same bits in each layout, beside other sequences, and whatever the chunks of a prompt."""
    needs_own_kernels(library, dtype)
    model = model_of(make_causal_lm(family, dtype, **SIZES, head_dim=32), "own", library, monkeypatch)
    model.drafts = draft_weights(model, 16)
    model.lean.use_drafts(model.drafts)
    tokens = [token % 17 for token in range(30)]
    for length in (0, 63, 130):
        alone = states(model, [Part(0, length, tokens, ForwardLayout(30))])[0]
        for branches, size in (((), 0), ((1,), 1), ((1, 7, 30), 9)):
            layout = ForwardLayout(30, branches, size)
            others = [Part(1, 5, range(2), ForwardLayout(2, (1, 2), 8)), Part(2, 99, [3] * 50, ForwardLayout(50))]
            for parts in ([Part(0, length, tokens, layout)], [Part(3, length, tokens, layout), *others]):
                assert torch.equal(states(model, parts)[0][:30], alone)
        pool = KVPool(1, 400)
        chunks = [token % 19 for token in range(length)] + [*tokens]
        with torch.inference_mode():
            parts = [
                Part(0, n, chunks[n : n + 7], ForwardLayout(len(chunks[n : n + 7]))) for n in range(0, len(chunks), 7)
            ]
            each = torch.cat([model.forward(PackedForward(pool, [part])) for part in parts])
        assert torch.equal(each[length:], alone)


def draft_weights(model, rank=3):
    """Random pairs on three of the four linears of a layer."""
    draw = torch.Generator().manual_seed(0)
    about, ffn = model.causal_lm.config, SIZES["intermediate_size"]
    heads, groups, h = about.num_attention_heads, about.num_key_value_heads, SIZES["hidden_size"]
    d = getattr(about, "head_dim", None) or h // heads
    widths = {"qkv": (h, (heads + 2 * groups) * d), "o": (heads * d, h), "down": (ffn, h)}

    def pair(inputs, outputs):
        return Pair(*(torch.randn(size, generator=draw).to(model.dtype) for size in ((rank, inputs), (outputs, rank))))

    layers = [{name: pair(*sizes) for name, sizes in widths.items()} for _ in range(about.num_hidden_layers)]
    return DraftWeights(rank, torch.randn(h, generator=draw).to(model.dtype), layers, None)


@compiles
@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_draft_weights_have_the_bits_of_python(library, form, dtype, monkeypatch):
    """One sequence, whose masks are adjacent rows, and two, whose masks are not."""
    causal_lm = make_causal_lm("qwen3", dtype, **SIZES)
    found = []
    for calls in (library, None):
        model = model_of(causal_lm, form, calls, monkeypatch)
        model.drafts = draft_weights(model)
        model.lean.use_drafts(model.drafts)
        layout, pool = ForwardLayout(5, (1, 3), 4), KVPool(2, 100)
        parts = [Part(slot, 0, range(5), layout) for slot in (0, 1)]
        with torch.inference_mode():
            found.append([model.forward(PackedForward(pool, some)) for some in (parts[:1], parts)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert not torch.equal(found[0][0][:5], found[0][0][5:10])


@compiles
@pytest.mark.process
@pytest.mark.parametrize("rank", [16, 64, 24])  # the last one has no product of its own
@pytest.mark.parametrize("form", ["laid out", "int8", "int4"])
def test_the_own_product_of_draft_weights(library, form, rank, monkeypatch):
    """Few rows of masks, adjacent or not, and more than its limit: clean rows keep their bits."""
    causal_lm = make_causal_lm("qwen3", torch.bfloat16, **SIZES)
    layouts = [ForwardLayout(5, (1, 3), 4), ForwardLayout(2, (1,), 1), ForwardLayout(8, tuple(range(1, 9)), 13)]
    for layout in layouts:
        found = []
        for calls in (library, None):
            model = model_of(causal_lm, form, calls, monkeypatch)
            model.drafts = draft_weights(model, rank)
            model.lean.use_drafts(model.drafts)
            parts = [Part(slot, 0, range(layout.num_drafts), layout) for slot in (0, 1)]
            with torch.inference_mode():
                packed = [PackedForward(KVPool(2, 200), some) for some in (parts[:1], parts)]
                found.append([model.forward(one) for one in packed])
        for ours, theirs, one in zip(*found, packed, strict=True):
            masks = torch.zeros(len(ours), dtype=torch.bool)
            masks[one.mask_rows] = True
            assert torch.equal(ours[~masks], theirs[~masks])
            scale = theirs[masks].float().abs().max()
            assert (ours[masks].float() - theirs[masks].float()).abs().max() < 0.05 * scale


@compiles
@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_has_the_bits_of_python_in_thousands_of_rows(library, dtype):
    """A scale that is rounded otherwise changes one byte in thousands."""
    torch.manual_seed(0)
    values, scales, factors = to_int8(torch.randn(96, 576).to(dtype), torch.linspace(0.1, 10, 576))
    product = int8_product(values, scales, factors, None, dtype)
    rows = torch.randn(15360, 576).to(dtype)
    assert torch.equal(library.Product(*product.kernel).of(rows), product.of(rows))


@compiles
@pytest.mark.process
@pytest.mark.parametrize("change", ["gelu", "another forward"])
def test_what_cpp_lacks_stays_in_python(library, change):
    model = wrap_model(make_causal_lm("llama", torch.float32, **({"hidden_act": "gelu"} if change == "gelu" else {})))
    if change != "gelu":
        model.causal_lm.model.layers[0].mlp.act_fn.forward = torch.relu
    use_lean_forward(model, take=True, library=library)
    assert not model.lean.is_compiled


@compiles
@pytest.mark.process
def test_a_loaded_model_uses_it(library, tmp_path):
    make_causal_lm("llama", torch.float32).save_pretrained(tmp_path)
    assert load_model(tmp_path).lean.is_compiled
    assert not load_model(tmp_path, keep_weights=True).lean.is_compiled  # the weights may change
    assert native.library_file().is_file()


def test_without_a_compiler_one_line_says_so(forget, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = call("tools/compile.py")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert "c++: not found; install it" in done.stderr and not native.library_file().exists()


@pytest.mark.process
def test_a_compiler_that_fails_leaves_nothing(forget, tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    asked = 'case "$1" in -v|--version|-dump*) exec c++ "$@";; esac'
    compiler.write_text(f"#!/bin/sh\n{asked}\necho 'lean.cpp:1: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UserError, match=r"lean.cpp: cannot be compiled here \(lean.cpp:1: error: no such header\)"):
        native.compile_library()
    assert list(native.library_file().parent.iterdir()) == []


def refuse(_):
    raise PermissionError


@pytest.mark.parametrize("damage", ["no library", "cut", "another user", "everybody writes", "no access"])
def test_what_is_not_whole_or_not_the_users_own_is_not_loaded(forget, damage, monkeypatch):
    """Loading a damaged library would end the process by a signal."""
    path = native.library_file()
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"no library")
    native._checksum_file(path).write_text(sha256_of(path))
    if damage != "no library":
        monkeypatch.setattr(native, "spec_from_file_location", lambda *_: pytest.fail("it was loaded"))
    if damage == "cut":
        path.write_bytes(b"no lib")
    elif damage == "another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        if os.geteuid() == 0:  # root's files are trusted
            os.chown(path, 54321, -1)
    elif damage == "everybody writes":
        path.chmod(0o666)
    elif damage == "no access":
        monkeypatch.setattr(native, "_is_own", refuse)
    native.library.cache_clear()
    assert native.library() is None


def test_a_cache_that_cannot_be_written_is_named(forget, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set TIDAR_CACHE to a folder that can be written"):
        native.compile_library()
