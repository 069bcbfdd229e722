"Norms and rotary positions in fewer passes: the numbers of the model's own in every kind of model, or its own code"
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quick import few
import sage_finetune.base.fused as fused_module
from sage_finetune.base.fused import fused, fused_parts, RmsNorm, Rotary

small = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ids = torch.arange(3, 83).reshape(2, 40)
# kind → what is its own in the config, norms, and attentions that are computed in fewer passes
kinds = dict(llama=({}, 5, 2), gemma3_text=(dict(head_dim=16), 13, 2), glm=(dict(head_dim=16), 5, 0), qwen2=({}, 5, 2),
             stablelm=({}, 0, 2), qwen3=(dict(head_dim=16), 9, 2), mistral=({}, 5, 2), phi3=({}, 5, 2),
             cohere=({}, 0, 0), olmo2=({}, 9, 2), granite=({}, 5, 2), mixtral=(dict(num_local_experts=4), 5, 2))


def made(kind='llama', **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small | kinds[kind][0] | more))
    return model.requires_grad_(False).train()


def loss_and_gradient(model):
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=x, labels=ids, use_cache=False).loss
    return loss.item(),torch.autograd.grad(loss, x)[0]


def far(a, b): return ((a-b).norm()/b.norm()).item()


@pytest.mark.parametrize('kind', few([*kinds], 5))
def test_the_numbers_of_the_model(kind):
    model,(_,norms,attentions) = made(kind),kinds[kind]
    for n,p in model.named_parameters():
        if 'norm' in n: torch.nn.init.normal_(p, 1., .3) # else 1 and 1+0 would be the same
    parts = fused_parts(model)
    assert Counter('Attention' in type(m).__name__ for m in parts)==Counter([False]*norms+[True]*attentions)
    loss,gradient = loss_and_gradient(model)
    with fused(parts): other,ours = loss_and_gradient(model)
    assert other==pytest.approx(loss, rel=1e-6) and far(ours, gradient)<3e-6
    assert bool(parts)==(not torch.equal(ours, gradient)) # it was at work
    assert torch.equal(loss_and_gradient(model)[1], gradient) # and is not any more


@pytest.mark.parametrize('kind,own', [('phi3', True), ('stablelm', False)])
def test_positions_of_a_part_of_a_head(kind, own):
    "A function that is given whole heads and fewer angles is called; one that is given the part is ours"
    model = made(kind, partial_rotary_factor=.5)
    _,gradient = loss_and_gradient(model)
    with fused({m: f for m,f in fused_parts(model).items() if 'Attention' in type(m).__name__}):
        _,ours = loss_and_gradient(model)
    assert torch.equal(ours, gradient)==own and far(ours, gradient)<3e-6


@pytest.mark.parametrize('how', ['16 bits', 'no gradients', 'trained norms', 'hooks', 'another device'])
def test_what_keeps_its_own(how):
    model = made()
    if how=='16 bits': model = model.to(torch.bfloat16)
    if how=='trained norms':
        for n,p in model.named_parameters(): p.requires_grad_('norm' in n)
    if how=='hooks':
        for m in model.modules(): m._hf_hook = object()
    if how=='another device': model = model.to('meta')
    parts = fused_parts(model)
    if how in ('hooks', 'another device'): assert parts=={}
    elif how=='trained norms': assert {type(m).__name__ for m in parts}=={'LlamaAttention'}
    elif how=='16 bits':
        _,gradient = loss_and_gradient(model)
        with fused(parts): assert torch.equal(loss_and_gradient(model)[1], gradient)
    else:
        with torch.no_grad():
            logits = model(ids).logits
            with fused(parts): assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize('wrong', ['norm', 'gradient of the norm', 'turn', 'way back'])
def test_a_wrong_formula_is_found(wrong, monkeypatch):
    "Each of them would be tried, and left out"
    monkeypatch.setattr(fused_module, '_norms', {})
    monkeypatch.setattr(fused_module, '_positions', {})
    forward,backward,turned = RmsNorm.forward,RmsNorm.backward,fused_module._turned
    if wrong=='norm':
        monkeypatch.setattr(RmsNorm, 'forward', staticmethod(lambda ctx, x, w, eps: forward(ctx, x, w, eps)*1.00001))
    if wrong=='gradient of the norm':
        monkeypatch.setattr(RmsNorm, 'backward', staticmethod(lambda ctx, g: (backward(ctx, g)[0]*1.00001, None, None)))
    if wrong=='turn': monkeypatch.setattr(fused_module, '_turned', lambda x, c, s, way: turned(x, c, -s, way))
    if wrong=='way back': monkeypatch.setattr(fused_module, '_turned', lambda x, c, s, way: turned(x, c, s, abs(way)))
    left = {type(m).__name__ for m in fused_parts(made())}
    assert left=={'LlamaAttention' if 'norm' in wrong else 'LlamaRMSNorm'}


def test_other_models_keep_theirs_meanwhile():
    one,other = made(),made()
    _,gradient = loss_and_gradient(other)
    with fused(fused_parts(one)): assert torch.equal(loss_and_gradient(other)[1], gradient)


def test_angles_of_both_halves_count():
    "A function is tried with angles that differ between the halves, so that one which uses a half of them is found"
    q,cos,sin = torch.randn(1, 1, 2, 4),torch.randn(1, 2, 4),torch.randn(1, 2, 4)
    ours,_ = Rotary.apply(q, q, cos, sin)
    exchanged = torch.cat((-q[..., 2:], q[..., :2]), -1)
    assert torch.allclose(ours, q*cos+exchanged*sin, atol=1e-6)
