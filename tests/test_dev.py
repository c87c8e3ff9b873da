"""The development module: kernels on NumPy arrays, in every instruction set that this processor has, without torch."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import kernels
from tests import places

try:
    import pyeff_dev as dev
except ImportError:
    if "dev" in places.REQUIRED:
        raise
    pytest.skip("the development module was not built (make install builds it)", allow_module_level=True)

ISAS = dev.isa_usable()
# By name: NumPy has no bfloat16, so the module takes its bits as uint16.
NUMBERS = ("float64", "float32", "bfloat16")
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def encode(x, number):
    """float64 -> what the module takes, to nearest and ties to even."""
    if number != "bfloat16":
        return np.ascontiguousarray(x, number)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(x):
    """What the module takes or returns -> float64."""
    if x.dtype != np.uint16:
        return x.astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def random(rng, number, *shape, scale=1.0):
    """Encoded numbers and the very same in float64."""
    x = encode(scale * rng.uniform(-1, 1, shape), number)
    return x, decode(x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
def test_stream_copy_and_read(isa, threads):
    source = np.random.default_rng(0).integers(0, 256, (2 << 20) + 77, dtype=np.uint8)
    target = np.zeros_like(source)
    dev.stream_copy(target, source, isa=isa, threads=threads)
    np.testing.assert_array_equal(target, source)
    assert dev.stream_read(target, isa=isa, threads=threads) == dev.stream_read(source, isa=isa, threads=1)


@pytest.mark.parametrize("isa", ISAS)
def test_fma_loop(isa):
    assert dev.fma_loop("float32", 20, isa=isa, threads=3) == 6 * dev.fma_loop("float32", 10, isa=isa) > 0


def product_bound(number, x, w, result):
    """Rounding of sums in the compute type, and of the result."""
    wide = "float64" if number == "float64" else "float32"
    terms = np.abs(x) @ np.abs(w).T
    return EPS[wide] * (2 + np.sqrt(x.shape[1])) * (terms + 1) + EPS[number] * np.abs(result)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 1, 1), (7, 63, 97), (97, 500, 65), (3, 5000, 7), (0, 4, 4)])
def test_linear(isa, number, rows, inner, out):
    rng = np.random.default_rng(rows + inner)
    (x, x64), (w, w64), (b, b64) = (random(rng, number, *s) for s in ((rows, inner + 3), (out, inner), (out,)))
    x, x64 = x[:, :inner], x64[:, :inner]  # rows apart
    oracle = x64 @ w64.T + b64
    results = [dev.Linear(w, isa=isa, threads=threads)(x, bias=b) for threads in (1, 2, 5)]
    assert (np.abs(decode(results[0]) - oracle) <= product_bound(number, x64, w64, oracle)).all()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    without = np.zeros_like(results[0])
    assert dev.Linear(w, isa=isa)(x, out=without) is without
    product = x64 @ w64.T
    assert (np.abs(decode(without) - product) <= product_bound(number, x64, w64, product)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 25, 97), (16, 7, 500), (2, 3, 0), (0, 2, 5)])
def test_dot(isa, number, m, n, k):
    rng = np.random.default_rng(k)
    (a, a64), (b, b64) = random(rng, number, m, k), random(rng, number, n, k + 5)
    b, b64 = b[:, :k], b64[:, :k]
    result = dev.dot(a, b, isa=isa)
    assert result.dtype == ("float64" if number == "float64" else "float32")
    bound = product_bound("float64" if number == "float64" else "float32", a64, b64, a64 @ b64.T)
    assert (np.abs(result - a64 @ b64.T) <= bound).all()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def read_oracle(a, phi, cell, norm, reduce, eps=1e-6):
    """READ in float64; ``a`` holds the arguments by name. Returns the result and the last c."""
    lead = phi[0].shape[0], a["w_hh"].shape[1]
    h, c, total = a.get("h0", np.zeros(lead)), a.get("c0", np.zeros(lead)), 0.0
    for x in phi:
        if norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        if norm != "none":
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * a.get("norm_weight", 1.0) + a.get("norm_bias", 0.0)
        from_x, from_h = x @ a["w_ih"].T + a.get("b_ih", 0.0), h @ a["w_hh"].T + a.get("b_hh", 0.0)
        if cell == "rnn":
            h = np.tanh(from_x + from_h)
        elif cell == "gru":
            (xr, xz, xn), (hr, hz, hn) = np.split(from_x, 3, -1), np.split(from_h, 3, -1)
            z = sigmoid(xz + hz)
            h = (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * h
        else:
            i, f, g, o = np.split(from_x + from_h, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        total = total + h if reduce == "mean" else h
    return total / (len(phi) if reduce == "mean" else 1), c


def read_inputs(number, cell, norm, layers=3, tokens=21, width=19, rank=11):
    """Encoded arguments and phi, and both in float64."""
    rng = np.random.default_rng(GATES[cell] + layers)
    rows = GATES[cell] * rank
    shapes = {"w_ih": (rows, width), "w_hh": (rows, rank), "b_ih": (rows,), "b_hh": (rows,), "h0": (tokens, rank)}
    if norm != "none":
        shapes["norm_weight"] = (width,)
    if norm == "layer":
        shapes["norm_bias"] = (width,)
    if cell == "lstm":
        shapes["c0"] = (tokens, rank)
    pairs = {name: random(rng, number, *shape, scale=0.6) for name, shape in shapes.items()}
    # Each layer lies otherwise in memory.
    spread, wide = random(rng, number, tokens, 2 * width), random(rng, number, width, tokens)
    plain = random(rng, number, tokens, width)
    phi = [(plain[0], plain[1]), (spread[0][:, ::2], spread[1][:, ::2]), (wide[0].T, wide[1].T)][:layers]
    encoded, exact = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    return encoded, exact, [p[0] for p in phi], [p[1] for p in phi]


def read(a, isa, threads=1, **options):
    weights = {name: x for name, x in a.items() if name not in ("h0", "c0")}
    return dev.Read(**weights, isa=isa, threads=threads, **options)


def states(a):
    return {name: a[name] for name in ("h0", "c0") if name in a}


def gradients(cell, norm):
    names = ["dphi", "dw_ih", "dw_hh", "db_ih", "db_hh", "dh0"]
    names += ["dnorm_weight"] if norm != "none" else []
    names += ["dnorm_bias"] if norm == "layer" else []
    return names + (["dc0"] if cell == "lstm" else [])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_read_forward(isa, number, cell, norm, reduce):
    a, exact, phi, phi64 = read_inputs(number, cell, norm)
    oracle, c_last = read_oracle(exact, phi64, cell, norm, reduce)
    options = {"cell": cell, "norm": norm, "reduce": reduce}
    found = read(a, isa, **options).forward(phi, **states(a))
    # bfloat16 rounds the state of every layer; the sums run over d and r.
    bound = EPS[number] * 3 + EPS["float64" if number == "float64" else "float32"] * 8 * np.sqrt(19 + 11)
    assert np.abs(decode(found["out"]) - oracle).max() <= bound
    if cell == "lstm":
        assert np.abs(decode(found["c_last"]) - c_last).max() <= bound
    threaded = read(a, isa, threads=3, **options).forward(phi, **states(a), save=True, save_gates=True)
    np.testing.assert_array_equal(threaded["out"], found["out"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("save_gates", [True, False])
def test_read_backward(isa, cell, norm, save_gates):
    """float64 against central differences along a random direction in each argument; the others against float64."""
    rng = np.random.default_rng(1)
    options, wanted = {"cell": cell, "norm": norm, "reduce": "mean"}, gradients(cell, norm)
    a, exact, phi, phi64 = read_inputs("bfloat16", cell, norm)  # numbers that every type can hold
    grad, grad64 = random(rng, "bfloat16", *a["h0"].shape)
    results = {}
    for number in NUMBERS:
        b = {name: encode(x, number) for name, x in exact.items()}
        layers = [encode(x, number) for x in phi64] if number != "bfloat16" else phi
        problem = read(b, isa, threads=2, **options)
        saved = problem.forward(layers, **states(b), save=True, save_gates=save_gates)
        g = grad if number == "bfloat16" else encode(grad64, number)
        results[number] = problem.backward(layers, saved, grad_out=g, wanted=wanted, **states(b))
    found = results["float64"]

    step = 1e-6
    for name in wanted:
        argument = name[1:]

        def moved(by, argument=argument, name=name):
            direction = np.random.default_rng(2).standard_normal(found[name].shape)
            if argument == "phi":
                out, _ = read_oracle(
                    exact, [p + by * d for p, d in zip(phi64, direction, strict=True)], cell, norm, "mean"
                )
            else:
                out, _ = read_oracle({**exact, argument: exact[argument] + by * direction}, phi64, cell, norm, "mean")
            return (out * grad64).sum(), direction

        (up, direction), (down, _) = moved(step), moved(-step)
        slope = (found[name] * direction).sum()
        # Of third order in the step, and the rounding of two sums over it.
        assert abs((up - down) / (2 * step) - slope) <= 1e-7 * max(1.0, np.abs(found[name]).sum()), name
        for number in ("float32", "bfloat16"):
            gap = np.abs(decode(results[number][name]) - found[name]).max() / np.abs(found[name]).max()
            assert gap <= 4 * EPS[number] * np.sqrt(3), (name, number)  # the roundings of three layers


@pytest.mark.parametrize("isa", ISAS)
def test_read_takes_float32_phi_beside_bfloat16_weights(isa):
    a, _, phi, phi64 = read_inputs("bfloat16", "gru", "none")
    problem = read(a, isa, norm="none")
    found = [problem.forward(p, **states(a), save=True) for p in (phi, [encode(x, "float32") for x in phi64])]
    np.testing.assert_array_equal(found[0]["h"], found[1]["h"])  # the very same numbers


@pytest.mark.parametrize("isa", ISAS)
def test_read_gradients_are_the_same_alone(isa):
    a, _, phi, _ = read_inputs("float32", "lstm", "layer")
    problem = read(a, isa, cell="lstm", norm="layer")
    saved = problem.forward(phi, **states(a), save=True)
    wanted = gradients("lstm", "layer")
    grads = {"grad_out": np.ones_like(a["h0"]), "grad_c": np.ones_like(a["h0"])}
    together = problem.backward(phi, saved, **grads, **states(a), wanted=wanted)
    for name in wanted:
        alone = problem.backward(phi, saved, **grads, **states(a), wanted=[name])
        assert list(alone) == [name]
        np.testing.assert_array_equal(alone[name], together[name])


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("match", ["linear 64", "dot", "gru 1 forward", "lstm 1 backward"])
def test_microbenchmark_runs_what_it_is_told(dtype, match, capsys):
    assert kernels.main(["--match", match, "--turns", "1", "--dtype", dtype]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.startswith(dtype)
    assert match in row
    assert row.endswith("%")


# A bad argument is an exception that names it, never a crash: whoever develops a kernel calls it with many.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"isa": "sse9"}, "isa is 'sse9', expected portable"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8', expected float64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        dev.fma_loop(**{"dtype": "float32", "iterations": 1, **arguments})


def test_nothing_is_converted_behind_the_back():
    with pytest.raises(TypeError):
        dev.stream_copy(np.zeros(8, np.float32), np.zeros(8, np.float32))


def unaligned(*shape):
    count = int(np.prod(shape))
    return np.zeros(4 * count + 1, np.uint8)[1:].view(np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("weight", "x", "options", "message"),
    [
        (np.zeros((3, 4), np.int32), None, {}, "weight is int32"),
        (np.zeros((3, 4), ">f4"), None, {}, "weight is >f4"),
        (np.zeros((3, 0), np.float32), None, {}, "weight is not a matrix, or is empty"),
        (np.zeros((4, 3), np.float32).T, None, {}, "weight is not contiguous"),
        (unaligned(3, 4), None, {}, "weight is not aligned"),
        (np.zeros((3, 4), np.float32), np.zeros((2, 5), np.float32), {}, r"x has shape \[2, 5\], expected \[2, 4\]"),
        (np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float64), {}, "x has another dtype"),
        (np.zeros((3, 4), np.float32), np.zeros((2, 8), np.float32)[:, ::2], {}, "columns are not adjacent"),
        (np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32), {"bias": np.zeros(2, np.float32)}, "bias has"),
        (np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32), {"out": np.zeros((2, 2), np.float32)}, "out has"),
    ],
)  # fmt: skip
def test_bad_products(weight, x, options, message):
    with pytest.raises(ValueError, match=message):
        dev.Linear(weight)(x, **options)


def test_results_are_not_written_where_that_is_forbidden():
    out = np.zeros((2, 3), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        dev.Linear(np.zeros((3, 4), np.float32))(np.zeros((2, 4), np.float32), out=out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "mru"}, "cell is 'mru', expected one of rnn, gru, lstm"),
        ({"norm": "none"}, "norm_weight was given with norm 'none'"),
        ({"norm_bias": np.zeros(19, np.float32)}, "norm_bias was given without norm 'layer'"),
        ({"w_ih": np.zeros((33, 19), np.float64)}, "another dtype"),
        ({"w_ih": np.zeros((32, 19), np.float32)}, r"w_ih has shape \[32, 19\], expected \[33, 19\]"),
        ({"b_hh": np.zeros(7, np.float32)}, "b_hh has shape"),
        ({"phi": []}, "phi is empty"),
        ({"phi": [np.zeros((21, 19), np.float64)]}, "phi differs in dtype from the weights"),
        ({"phi": [np.zeros((21, 19), np.float32), np.zeros((21, 19), np.uint16)]}, "phi has another dtype"),
        ({"phi": [np.zeros((21, 18), np.float32)]}, r"phi has shape \[21, 18\]"),
        ({"phi": [np.zeros((21, 19), np.float32), np.zeros((20, 19), np.float32)]}, r"phi has shape \[20, 19\]"),
        ({"phi": [np.zeros((1,) * 9 + (19,), np.float32)]}, "1 to 8 dimensions"),
        ({"phi": [unaligned(21, 19)]}, "phi is not aligned"),
        ({"h0": np.zeros((20, 11), np.float32)}, "h0 has shape"),
        ({"c0": np.zeros((21, 11), np.float32)}, "c0 was given without an lstm"),
        ({"saved": {}}, "h was not saved"),
        ({"saved": {"h": np.zeros((3, 21, 10), np.float32)}}, "h has shape"),
        ({"wanted": ["dc0"]}, "there is no gradient 'dc0'"),
        ({"wanted": ["dw"]}, "there is no gradient 'dw'"),
        ({"grad_c": np.zeros((21, 11), np.float32)}, "grad_c was given without an lstm"),
    ],
)  # fmt: skip
def test_bad_read_calls(change, message):
    a, _, phi, _ = read_inputs("float32", "gru", "rms")
    given = {"cell": "gru", "norm": "rms", "phi": phi, "grad_out": np.ones((21, 11), np.float32), "wanted": ["dw_ih"]}
    given.update(a | change)
    weights = {k: v for k, v in given.items() if k.startswith(("w_", "b_", "norm", "cell"))}
    call = {k: v for k, v in given.items() if k in ("phi", "h0", "c0")}
    rest = {k: v for k, v in given.items() if k in ("grad_out", "grad_c", "wanted")}

    def run():
        problem = dev.Read(**weights)
        saved = problem.forward(**call, save=True)
        problem.backward(**call, **rest, saved=change.get("saved", saved))

    with pytest.raises(ValueError, match=message):
        run()
