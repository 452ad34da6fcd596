"""The faster ways under a loaded model compute what the plain ones do, and get out of the way where they must."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn as nn

from decoders import gpt_neo, kernels, phi, phi3
from decoders.kernels import build, calls, native
from decoders.kernels.attention import attention, rotate
from decoders.kernels.linear import MAX_ROWS, linear
from tests.families import PADDED, inputs

CLOSE = {"atol": 2e-5, "rtol": 0}
nn.Linear(64, 64).bfloat16()(torch.ones(64, 64).bfloat16())  # at which PyTorch itself, on an Arm without
ONEDNN = torch.backends.mkldnn.enabled  # bfloat16, turns oneDNN off for good
PHI = phi.PhiConfig(
    vocab_size=11,
    hidden_size=48,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=1.0,
)
NEO = gpt_neo.GPTNeoConfig(
    vocab_size=11,
    hidden_size=48,
    num_layers=1,
    num_heads=4,
    initializer_range=1.0,
    attention_types=[[["global"], 1]],
)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (3, 7), (1, 0)], ids=str)
@pytest.mark.parametrize("stored", ["as it is", "turned", "a view"])
def test_linear_equals_pytorchs_own(dtype, rows, stored):
    """It chooses among kernels by dtype and number of rows, and leaves the choice of everybody else alone."""
    weight = {
        "as it is": torch.randn(31, 24),
        "turned": torch.randn(24, 31).t(),
        "a view": torch.randn(40, 24)[5:36],
    }
    weight, bias, x = weight[stored].to(dtype), torch.randn(31).to(dtype), torch.randn(*rows, 24).to(dtype)
    for b in (bias, None):
        found = linear(x, weight, b)
        expected = torch.nn.functional.linear(x, weight, b)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.2, torch.float16: 0.02}[
            dtype
        ]
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    with pytest.raises(RuntimeError, match="shapes|size"):
        linear(torch.randn(1, 9).to(dtype), weight, None)
    assert torch.backends.mkldnn.enabled is ONEDNN


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_prepared_model_equals_a_plain_one(family, dtype):
    """A whole pass and steps, padded."""
    plain, prepared = family.model(dtype=dtype), kernels.prepare(family.model(dtype=dtype))
    ids, mask = inputs(101, padded=True)
    results = []
    for model in (plain, prepared):
        cache, logits = None, []
        for part in ids.split([PADDED + 3, 1, 1, 14], dim=1):
            seen = mask[:, : sum(x.shape[1] for x in logits) + part.shape[1]]
            output = model(part, attention_mask=seen, past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results, **(CLOSE if dtype == torch.float32 else {"atol": 0.2, "rtol": 0}))
    kernels.plain(prepared)
    assert torch.equal(prepared(ids).logits, plain(ids).logits)


def test_autograd_autocast_and_functional_transforms_see_the_plain_model(family):
    model, prepared = family.model(), kernels.prepare(family.model())
    ids, _ = inputs(101)
    assert torch.equal(model(ids, labels=ids).loss, prepared(ids, labels=ids).loss)
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(model(ids).logits, prepared(ids).logits)

    def loss(parameters, ids):
        return torch.func.functional_call(
            prepared, parameters, (ids,), {"labels": ids, "use_cache": False}
        ).loss

    parameters = {name: p.detach() for name, p in prepared.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids[:, None])
    alone = torch.func.grad(loss)(parameters, ids[:1])
    for name, gradient in alone.items():
        torch.testing.assert_close(each[name][0], gradient, atol=1e-5, rtol=1e-4)


def test_prepared_models_are_copied_and_pickled(family):
    model = kernels.prepare(family.model(dtype=torch.bfloat16))
    ids, _ = inputs(101)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=0.1, rtol=0)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def test_eight_threads_share_a_model_and_no_setting_is_touched(family):
    """The flag of oneDNN was seen off by other threads, and stayed off after an exception."""
    model = kernels.prepare(family.model(dtype=torch.bfloat16))
    ids = inputs(101)[0][:1]
    expected, wrong = model.generate(ids, max_new_tokens=12, eos_token_id=None).tolist(), []

    def work(number: int) -> None:
        for _ in range(3):
            if number == 0:
                with pytest.raises(RuntimeError), torch.no_grad():
                    model.get_submodule(family.output)(torch.randn(1, 5).bfloat16())
            if torch.backends.mkldnn.enabled is not ONEDNN:
                wrong.append("another setting")
            if model.generate(ids, max_new_tokens=12, eos_token_id=None).tolist() != expected:
                wrong.append("another text")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.backends.mkldnn.enabled is ONEDNN


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("H", "K", "S", "D"), [(4, 4, 1, 12), (4, 2, 37, 80), (6, 1, 200, 100), (3, 3, 65, 256)]
)
def test_one_query_equals_the_formula(dtype, H, K, S, D):
    """Keys and values are views of a larger cache, the mask of one row or of every head."""
    q, cache = torch.randn(2, H, 1, D).to(dtype), torch.randn(2, 2, K, S + 9, D).to(dtype)
    k, v = cache[0, :, :, 3 : 3 + S], cache[1, :, :, 3 : 3 + S]
    wide = [t.double() for t in (q, k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1))]
    for bias in (
        None,
        torch.randn(2, 1, 1, S),
        torch.randn(1, H, 1, S).masked_fill(torch.arange(S) < S // 2, -torch.inf),
    ):
        found, _ = attention(None, None, q, k, v, None if bias is None else bias.to(dtype), 0.3)
        mask = None if bias is None else bias.to(dtype).double()
        expected = torch.nn.functional.scaled_dot_product_attention(*wide, mask, scale=0.3)
        bound = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert found.dtype == dtype and (found - expected).abs().max() < bound
    k = k.clone()
    k[0, 0, S // 2, 0] = torch.nan
    assert attention(None, None, q, k, v, None, 0.3)[0][0, 0].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 48), (3, 7, 45), (12, 130), (2, 0, 16), (16,)], ids=str)
def test_the_norm_equals_the_model_files_own(dtype, size):
    """As near to the truth as the plain one; rows that are none, turned ones and NaN included."""
    norm = phi3.RMSNorm(size[-1], 1e-5).to(dtype)
    norm.weight.copy_(1 + 0.3 * torch.randn(size[-1]))
    prepared, x = kernels.prepare(copy.deepcopy(norm)), (3 * torch.randn(size)).to(dtype)
    turned = x.mT.contiguous().mT if x.dim() > 1 else x
    exact, plain, found = copy.deepcopy(norm).double()(x.double()), norm(x), prepared(turned)
    assert found.dtype == dtype and found.shape == x.shape
    if x.numel():
        off = (found - exact).abs().max()
        assert off <= (plain - exact).abs().max() + 1e-6
        x.view(-1, size[-1])[0, 0] = torch.nan
        assert prepared(x).view(-1, size[-1])[0].isnan().all()
    with torch.enable_grad():
        torch.testing.assert_close(prepared(x.requires_grad_()), norm(x), atol=0, rtol=0, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("B", "H", "T", "D", "R"), [(1, 4, 1, 80, 32), (3, 2, 1, 100, 26), (2, 3, 37, 24, 24), (1, 2, 5, 66, 2)]
)
def test_the_rotation_is_the_model_files_own_bit_for_bit(dtype, B, H, T, D, R):
    """Views as the projections give them, tables of one row or of each."""
    fused = torch.randn(B, T, H, 3, D).to(dtype)
    for x in (fused[:, :, :, 1].transpose(1, 2), fused.flatten(3)[..., :D].transpose(1, 2).contiguous()):
        for rows in (1, B):
            angles = torch.randn(rows, 1, T, R)
            tables = angles.cos().to(dtype), angles.sin().to(dtype)
            found = rotate(phi.rotate, x, *tables)
            assert torch.equal(found, phi.rotate(x, *tables)) and found.is_contiguous()
    broken = fused[:, :, :, 0].transpose(1, 2).clone()
    broken[0, 0, 0, 0], broken[0, 0, 0, D - 1] = torch.nan, torch.inf
    torch.testing.assert_close(
        rotate(phi.rotate, broken, *tables),
        phi.rotate(broken, *tables),
        atol=0,
        rtol=0,
        equal_nan=True,
    )
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        rotate(phi.rotate, x, *tables).sum().backward()
    assert x.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [None, *kernels.KINDS])
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 40])
def test_one_call_for_q_k_and_v_gives_what_three_give(dtype, kind, rows, monkeypatch):
    """Bit for bit, with fewer heads of keys than of queries, with biases and without."""
    most = {None: MAX_ROWS, "int8": 99}.get(kind, 5 if dtype == torch.bfloat16 else 2 * MAX_ROWS)
    for config, model_class in ((PHI, phi.PhiForCausalLM), (NEO, gpt_neo.GPTNeoForCausalLM)):
        model = model_class(config).to(dtype).eval()
        model = kernels.prepare(kernels.quantize(model, kind) if kind else model)
        attn = next(m for m in model.modules() if hasattr(type(m), "qkv"))
        x = torch.randn(1, rows, 48).to(dtype)
        expected = [layer(x) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
        with monkeypatch.context() as patch:
            counted = count_calls(patch, type(attn.q_proj))
            for found, one in zip(attn.qkv(x), expected, strict=True):
                assert torch.equal(found, one)
        assert len(counted) == (0 if native.library() and rows <= most else 3)
        assert [len(part) for part in attn.qkv(x[:0])] == [0, 0, 0]


def count_calls(patch: pytest.MonkeyPatch, layer: type) -> list:
    calls = []
    patch.setattr(layer, "__call__", lambda self, x: calls.append(self) or nn.Module.__call__(self, x))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "int8"])
def test_who_looks_into_q_k_or_v_sees_each_of_them(kind, monkeypatch):
    """Hooks of a layer and of all, a layer in another's place, a `forward` that somebody has put there."""
    model = phi.PhiForCausalLM(PHI).eval()
    kernels.prepare(kernels.quantize(model, kind) if kind else model)
    attn, x = model.model.layers[0].self_attn, torch.randn(1, 1, 48)
    q, k, v = attn.qkv(x)
    twice = [
        lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    ]
    for hook in twice if kind is None else twice[:1]:  # 8 bits round the doubled input alike, and biases stay
        handle = hook(attn.k_proj)
        assert torch.equal(attn.qkv(x)[1], attn.k_proj(x)) and not torch.equal(attn.k_proj(x), k)
        handle.remove()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    attn.qkv(x)
    handle.remove()
    assert seen == [attn.q_proj, attn.k_proj, attn.v_proj]
    monkeypatch.setattr(attn.v_proj, "forward", lambda x: torch.zeros(1))
    assert attn.qkv(x)[2].shape == (1,)
    monkeypatch.undo()
    attn.v_proj = nn.Sequential(attn.v_proj, nn.Tanh())
    assert torch.equal(attn.qkv(x)[2], v.tanh()) and torch.equal(attn.qkv(x)[0], q)


def test_lines_of_c_are_no_longer_than_others():
    for source in sorted(build.SOURCE.parent.glob("*.[ch]")):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{source.name}:{number}"


def test_the_table_of_kernels_names_every_function():
    table = "".join(line for line in (build.SOURCE.parent / "kernels.c").open() if line.startswith("// |"))
    named = table.replace(", _int4", ", dequantize_int4")
    assert [name for name in calls.ARGUMENTS if name not in named] == []
