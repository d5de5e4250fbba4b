"""Attaching and detaching, packed weights, quantised backbones."""

import copy

import pytest
import torch
import transformers
from hf_models import attached, error, paths, random_model, randomize
from hf_oracle import Oracle
from torch import nn

from deltamem_kernels import hf

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def test_attach_is_idempotent_and_freezes():
    model = random_model()
    config = hf.DeltaMemConfig(rank=4)
    assert hf.attach(model, config) is model
    first = model._delta_mem
    hf.attach(model, hf.DeltaMemConfig(rank=4))
    assert model._delta_mem is first
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.self_attn.delta_mem.{leaf}"
        for i in range(3)
        for leaf in ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj", "beta_bias",
                     "delta_q_proj", "delta_k_proj", "delta_v_proj", "delta_o_proj")
    }  # fmt: skip
    with pytest.raises(ValueError, match="config must equal the attached one"):
        hf.attach(model, hf.DeltaMemConfig(rank=8))
    hf.detach(model)
    with pytest.raises(ValueError, match="detach: model must have a memory attached"):
        hf.detach(model)
    with pytest.raises(ValueError, match=r"DeltaMemState\.zeros: model must have a memory attached"):
        hf.DeltaMemState.zeros(model, 1)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"target_layers": [0, 7]}, r"attach: model must have attention layers \[7\] named self_attn"),
        ({"target_modules": ["attention"]}, "attach: model must have attention layers  named attention"),
    ],
)
def test_a_config_that_does_not_fit_leaves_the_model(options, text):
    model = random_model()
    names, trains = [n for n, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=text):
        hf.attach(model, hf.DeltaMemConfig(**options))
    with pytest.raises(TypeError, match="attach: config must be a DeltaMemConfig, got dict"):
        hf.attach(model, options)
    assert [n for n, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == trains


def test_detached_model_is_bit_identical():
    model = random_model("gemma3")
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    before = model(IDS).logits
    keys = list(model.state_dict())
    attached(model=model)
    assert not torch.equal(model(IDS, use_cache=False).logits, before)
    hf.detach(model)
    assert torch.equal(model(IDS).logits, before)
    assert list(model.state_dict()) == keys
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.layers.1.self_attn.q_proj.weight"]
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not [
        name for name in vars(model) if name.startswith(("_delta", "prepare", "_prepare", "_validate", "init_c"))
    ]


def test_without_effect_the_memory_leaves_attention_alone():
    model = random_model(attn_implementation="eager")
    before = model(IDS).logits
    hf.attach(model, hf.DeltaMemConfig())  # output_init zero
    with torch.no_grad():
        assert error(model(IDS).logits, before) < 1e-5


@torch.no_grad()
def test_bare_decoder_and_deep_copies():
    model = attached()
    hidden = model.model(IDS).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(IDS).logits)
    twin = copy.deepcopy(model)
    randomize(twin, 7)
    changed = twin(IDS).logits
    assert torch.equal(model.lm_head(hidden), model(IDS).logits)
    assert error(changed, model(IDS).logits) > 0.01
    base = transformers.AutoModel.from_config(model.config).eval()
    base.load_state_dict(hf.detach(copy.deepcopy(model)).model.state_dict())
    attached(model=base, rank=4)
    for name, p in base.named_parameters():
        p.copy_(model.get_parameter(f"model.{name}"))
    assert torch.equal(base(IDS).last_hidden_state, hidden)


def _edits(model):
    memory = model.model.layers[1].self_attn.delta_mem

    def optimizer():
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05).step()

    def data():
        memory.memory_k_proj.data.mul_(3)
        model.eval()

    def replaced():
        memory.delta_q_proj = nn.Parameter(memory.delta_q_proj.detach() * 2)

    return {
        "in place": lambda: memory.beta_bias.detach().add_(1),
        "optimizer": optimizer,
        "replaced": replaced,
        "state dict": lambda: memory.load_state_dict({n: 2 * p for n, p in memory.state_dict().items()}),
        "through .data": data,
        "zeroed": lambda: memory.delta_q_proj.zero_(),
        "a head from zero": lambda: memory.delta_q_proj.add_(0.1),
    }


def test_packed_weights_follow_the_parameters():
    model = attached(delta_heads=["q", "o"])
    memory = model.model.layers[1].self_attn.delta_mem
    with torch.no_grad():
        model(IDS)
        packed = memory.packed(torch.float32)
        assert packed.projection.shape == (32, 4 * 4)
        model(IDS)
        assert memory.packed(torch.float32) is packed
        for name, edit in _edits(model).items():
            before = model(IDS).logits
            if name == "optimizer":
                with torch.enable_grad():
                    edit()
            else:
                edit()
            after = model(IDS).logits
            assert error(after, before) > 1e-4, name
            with torch.enable_grad():  # under grad mode nothing is packed
                assert error(model(IDS, use_cache=False).logits, after) < 1e-5, name
            if name == "zeroed":
                assert set(memory.packed(torch.float32).deltas) == {"o"}


@torch.no_grad()
def test_copies_pack_their_own():
    model = attached()
    for p in model.parameters():
        p.mul_(1)
    model(IDS)
    twin = copy.deepcopy(model)
    for mine, its in zip(model._delta_mem.memories, twin._delta_mem.memories, strict=True):
        mine.delta_q_proj.mul_(2)
        its.delta_q_proj.mul_(2)
        for p, packed in zip(its.parameters(), mine._packed_versions, strict=True):
            while p._version < packed:
                p.mul_(1)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_hooks_on_o_proj_see_its_own_result():
    model = attached()
    want = model(IDS).logits
    o_proj, seen = model.model.layers[0].self_attn.o_proj, []
    o_proj.register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out)))
    assert torch.equal(model(IDS).logits, want)
    ((x, y),) = seen
    assert torch.equal(y, nn.functional.linear(x, o_proj.weight))


@torch.no_grad()
def test_zero_heads_are_skipped_and_read_only_calls_project_queries_alone(monkeypatch):
    model = attached(rank=5, delta_heads=["q", "k", "v", "o"])
    widths = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w: widths.append(w.shape[1]) or mm(x, w))
    for module in model._delta_mem.attentions.values():
        module.delta_mem.delta_k_proj.zero_()
        module.delta_mem.delta_v_proj.zero_()
    state = hf.DeltaMemState.zeros(model, 2)
    model(IDS, delta_state=state, use_cache=False)
    assert set(model.model.layers[0].self_attn.delta_mem.packed(torch.float32).deltas) == {"q", "o"}
    assert widths.count(20) == 3
    widths.clear()
    model(IDS, delta_state=state, delta_write=False, use_cache=False)
    assert widths.count(5) == 3 and widths.count(20) == 0


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantised_backbone():
    model = random_model(attn_implementation="eager")
    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    projections = {nn.Linear}
    quantised = torch.ao.quantization.quantize_dynamic(model, projections, dtype=torch.qint8)
    assert not isinstance(quantised.model.layers[0].self_attn.q_proj, nn.Linear)
    before = quantised(IDS).logits
    with pytest.raises(ValueError, match="output_init must not be 'base_slice' with quantised weights"):
        hf.attach(quantised, hf.DeltaMemConfig(rank=4, output_init="base_slice"))
    attached(model=quantised)
    logits = quantised(IDS).logits
    assert paths(quantised) == ["fused"] * 3
    assert error(logits, before) > 0.01
    # the formula around the same quantised layers, and the memory of the unquantised twin acts alike
    oracle = Oracle(quantised)
    assert error(logits, oracle(IDS)) < 1e-5
    twin = attached(model=random_model(attn_implementation="eager"))
    twin.model.layers[0].self_attn.delta_mem.load_state_dict(quantised.model.layers[0].self_attn.delta_mem.state_dict())
    assert error(logits, twin(IDS).logits) < 0.3
    hf.detach(quantised)
    assert torch.equal(quantised(IDS).logits, before)


def test_inits():
    for init, width in (("base_slice", 4), ("base_slice_fixed", 2)):
        model = random_model()
        config = hf.DeltaMemConfig(
            rank=4, output_init=init, base_slice_ref_width=2, delta_heads=["q", "o"], couple_lambda=False,
            trainable_delta_scale=True, delta_scale_init=0.5, num_state_heads=2,
        )  # fmt: skip
        hf.attach(model, config)
        attention = model.model.layers[0].self_attn
        memory = attention.delta_mem
        expected = nn.functional.normalize(attention.q_proj.weight[:, :width], dim=0) * 0.05
        assert error(memory.delta_q_proj[:, :width], expected) < 1e-6
        assert memory.delta_q_proj[:, width:].abs().sum() == 0 and memory.delta_k_proj.abs().sum() == 0
        assert memory.beta_bias.eq(-1.5).all() and memory.lambda_bias.eq(1.5).all()
        assert error(2 * memory.delta_scale_raw.sigmoid(), torch.tensor([0.5])) < 1e-6
        assert memory.memory_q_proj.abs().max() <= (1 / 32) ** 0.5 and memory.memory_q_proj.std() > 0.05
        assert memory.beta_proj.abs().sum() == 0
    model = random_model()
    hf.attach(model, hf.DeltaMemConfig(output_init="random"), dtype=torch.bfloat16)
    memory = model.model.layers[0].self_attn.delta_mem
    assert 0 < memory.delta_q_proj.abs().max() <= 0.05 * (1 / 8) ** 0.5 and memory.delta_q_proj.dtype == torch.bfloat16


@torch.no_grad()
def test_half_precision_model_within_its_rounding():
    model = attached(delta_heads=["q", "k", "v", "o"])
    exact = model(IDS).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    plain = error(hf.detach(copy.deepcopy(half))(IDS).logits.float(), hf.detach(copy.deepcopy(model))(IDS).logits)
    assert error(half(IDS).logits.float(), exact) < max(4 * plain, 0.05)
