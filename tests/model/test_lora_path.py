"Adapters of layers that share an input, in one step: the numbers of peft, in every kind of model, or peft's own path"
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config

from quick import few
import sage_finetune.model.lora_path as path_module
from sage_finetune.base.loading import load_model
from sage_finetune.config import LoRAConfig
from sage_finetune.model.adapter import add_lora, ready_for_quantised_training
from sage_finetune.model.lora_path import (
    group_outputs, lora_path, LoraPath, LoraProduct, prove_lora_path, shared_inputs, why_own_path
)
from sage_finetune.model.loss import evaluating, loss_sum

small = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
gpt2 = dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
attention = 'q_proj', 'k_proj', 'v_proj', 'o_proj'
kinds = dict(llama=small, qwen2=small, qwen3=small | dict(head_dim=16), gemma3_text=small | dict(head_dim=16),
             mistral=small, phi3=small, gpt2=gpt2, mixtral=small | dict(num_local_experts=4))
packed = dict(bits8=dict(load_in_8bit=True),
              bits4=dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32))
formats = 'fp32', 'bf16', 'bits8', 'bits4'
ids = torch.arange(3, 83).reshape(2, 40)


def made(kind='llama', numbers='fp32', **lora):
    "A small model of a kind with an adapter that has moved"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **kinds[kind]))
    if numbers in packed:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=BitsAndBytesConfig(**packed[numbers]), dtype=torch.float32)
        model = ready_for_quantised_training(model)
    elif numbers=='bf16': model = model.to(torch.bfloat16)
    targets = [*attention] if kind=='mixtral' else 'all-linear'
    model = add_lora(model, LoRAConfig(**dict(target_modules=targets, lora_dropout=0.) | lora)).train()
    with torch.no_grad():
        for n,p in model.named_parameters():
            if '.lora_B.' in n: p.normal_(std=.02)
    return model


def autocast_of(numbers):
    return (lambda: torch.autocast('cpu', torch.bfloat16)) if numbers=='bf16' else nullcontext


def loss_and_gradients(model, autocast=nullcontext):
    torch.manual_seed(5)
    with autocast(): loss = loss_sum(model, ids, ids)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss, *torch.autograd.grad(loss, trained)],torch.get_rng_state()


def largest(ours, theirs): return max(((a-b).float().norm()/b.float().norm()).item() for a,b in zip(ours, theirs))


def proved(model, autocast=nullcontext):
    with evaluating(model, training=True): return prove_lora_path(model, autocast)


def layers_of(model): return [m for m in model.modules() if isinstance(m, LoraLayer)]


# --- the numbers of peft

def compare(kind, numbers, dropout, most):
    model,autocast = made(kind, numbers, lora_dropout=dropout),autocast_of(numbers)
    path = proved(model, autocast)
    assert path.kept=={} and sum(map(len, path.groups))==len(layers_of(model))
    theirs,state = loss_and_gradients(model, autocast)
    with lora_path(path.groups): ours,after = loss_and_gradients(model, autocast)
    assert torch.equal(state, after) # as many random numbers, so what comes next draws the same
    of_loss,of_gradient = abs(ours[0]/theirs[0]-1).item(),largest(ours[1:], theirs[1:])
    assert of_loss<(1e-6 if most<1e-3 else 1e-3)
    assert of_gradient<most, (kind, numbers, dropout)
    return of_loss,of_gradient


def bound(numbers): return .0625 if numbers=='bf16' else 1e-6


quick = {(k, 'fp32', .05) for k in kinds} | {('llama', n, .05) for n in formats} | {('qwen2', 'bits8', 0.)}


@pytest.mark.parametrize('kind,numbers,dropout', sorted(quick))
def test_the_numbers_of_peft(kind, numbers, dropout): compare(kind, numbers, dropout, bound(numbers))


@pytest.fixture(scope='module')
def table():
    "What was found, printed as the table of benchmarks/README.md"
    found = {}
    yield found
    print(f'\n| gradients | {" | ".join(formats)} |\n|{" --- |"*(1+len(formats))}')
    for kind in kinds:
        cells = [', '.join(f'{found[kind, n, p][1]:.1g}' for p in (0., .05) if (kind, n, p) in found) for n in formats]
        print(f'| {kind} | {" | ".join(cells)} |')
    of_losses = {n: max((l for (_, m, _),(l, _) in found.items() if m==n), default=0) for n in formats}
    print('largest difference of a loss:', ', '.join(f'{n} {l:.1g}' for n,l in of_losses.items()))


@pytest.mark.slow
@pytest.mark.parametrize('dropout', [0., .05])
@pytest.mark.parametrize('numbers', formats)
@pytest.mark.parametrize('kind', kinds)
def test_the_numbers_of_peft_in_every_kind(kind, numbers, dropout, table):
    table[kind, numbers, dropout] = compare(kind, numbers, dropout, bound(numbers))


@pytest.mark.parametrize('lora', [dict(use_rslora=True), dict(bias='all'), dict(init_lora_weights='pissa'), dict(r=1),
                                  dict(r=3, lora_alpha=5), dict(init_lora_weights='gaussian')],
                         ids=lambda l: '-'.join(map(str, l.values())))
def test_other_adapters_too(lora):
    model = made(**lora)
    path = proved(model)
    assert path.kept=={} and path.group_difference<1e-6
    theirs = loss_and_gradients(model)[0]
    with lora_path(path.groups): ours = loss_and_gradients(model)[0]
    assert largest(ours, theirs)<3e-6


def test_x_is_kept_once_and_nothing_that_can_be_computed_again():
    layer = layers_of(made())[0]
    x = torch.randn(1, 8, 64, requires_grad=True)
    y, = group_outputs([layer], x)
    own = {id(p) for p in layer.parameters()}
    others = [t for t in y.grad_fn.next_functions[0][0].saved_tensors if id(t) not in own] if not hasattr(
        y.grad_fn, 'saved_tensors') else [t for t in y.grad_fn.saved_tensors if id(t) not in own]
    assert [t.data_ptr() for t in others]==[x.data_ptr()]


def test_the_input_needs_no_gradient_where_nobody_asks_for_it():
    how = path_module._How(torch.float32, (1.,), 0., (None,))
    W,a,b = torch.ones(2, 3),torch.ones(1, 3, requires_grad=True),torch.ones(2, 1, requires_grad=True)
    y, = LoraProduct.apply(torch.ones(4, 3), how, W, a, b)
    y.sum().backward()
    assert (y==6).all() and (a.grad==8).all() and (b.grad==12).all()


# --- how much is started

class Operations(TorchDispatchMode):
    "How many operations write numbers; views and empty tensors do not"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.n += not (views or str(func).startswith(('aten.empty', 'aten.new_empty', 'aten._unsafe_view')))
        return out


def operations(layers, outputs, half):
    x = torch.randn(2, 8, 64, dtype=torch.bfloat16 if half else None, requires_grad=True)
    wanted = [x, *(p for l in layers for p in l.parameters() if p.requires_grad)]
    gradients = [torch.ones(2, 8, l.out_features, dtype=x.dtype) for l in layers]
    with Operations() as counted:
        with autocast_of('bf16' if half else 'fp32')(): made = outputs(layers, x)
        torch.autograd.grad(made, wanted, gradients)
    return counted.n


@pytest.mark.parametrize('half', [True, False])
def test_less_is_started_than_by_peft(half):
    model = made(numbers='bf16' if half else 'fp32')
    for layers in (layers_of(model)[:3], layers_of(model)[3:4]):
        n,ours,theirs = len(layers),*(operations(layers, f, half) for f in (group_outputs, path_module._by_peft))
        assert ours<=5*n+4+2*(half or n>1) and ours<theirs, (n, ours, theirs)


@pytest.mark.parametrize('adapter,dropout', few([('attention', .05), ('all', .05), ('all', 0.), ('attention', 0.)]))
def test_a_pass_on_a_card_starts_less_moves_less_and_keeps_less(adapter, dropout, monkeypatch):
    "Counted on `meta`; how a card draws a mask too, which is not how a CPU does"
    monkeypatch.syspath_prepend(Path(__file__).parents[2]/'benchmarks')
    import passes
    short = Qwen2Config(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        intermediate_size=1024, vocab_size=1000, tie_word_embeddings=True)
    monkeypatch.setattr(passes, 'shape', short)
    peft,ours = (passes.on_card(adapter, together, dropout) for together in (False, True))
    assert ours['launches']<peft['launches'] and all(ours[k]<=peft[k] for k in ours), (peft, ours)


@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_what_lay_in_memory_before_is_not_read(half):
    "The gradients are written by products into tensors that nobody filled"
    nan = lambda *size: torch.full(size, float('nan'), dtype=half)
    d,g,b = nan(16, 12)[:, 4:8],torch.ones(16, 8, dtype=half),torch.ones(8, 4, dtype=half)
    assert (d.addmm_(g, b, beta=0, alpha=.5)==4).all()
    assert (nan(8, 4).addmm_(g.t(), d, beta=0, alpha=.5)==32).all()


# --- what it may not disturb

def test_nothing_of_a_model_changes():
    model = made(lora_dropout=.1)
    before = {n: p.clone() for n,p in model.state_dict().items()}
    state,modes = torch.get_rng_state(),[m.training for m in model.modules()]
    path = proved(model)
    assert torch.equal(state, torch.get_rng_state()) and modes==[m.training for m in model.modules()]
    with lora_path(path.groups): assert {*model.state_dict()}=={*before}
    assert all(torch.equal(before[n], p) for n,p in model.state_dict().items())
    assert not any('forward' in vars(l) for l in layers_of(model)) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('off', ['no gradient', 'switched off', 'an argument', 'another adapter'])
def test_peft_computes_where_it_is_asked_to(off, monkeypatch):
    model = made()
    path = proved(model)
    monkeypatch.setattr(path_module, 'group_outputs', None) # a call would fail
    with lora_path(path.groups), (torch.no_grad() if off=='no gradient' else nullcontext()):
        if off=='switched off':
            with model.disable_adapter(): assert model(ids).logits.isfinite().all()
        elif off=='an argument':
            names = ['__base__']*2
            assert model.eval()(ids, adapter_names=names).logits.isfinite().all()
        elif off=='another adapter':
            model.add_adapter('second', model.peft_config['default'])
            model.set_adapter('second')
            assert model(ids).logits.isfinite().all()
        else: assert model.generate(ids[:, :5], max_new_tokens=3).shape==(2, 8)


def test_answers_within_a_run_have_the_bits_they_have_without():
    model = made()
    model.eval()
    path = proved(model)
    with torch.no_grad():
        own = model(ids).logits
        with lora_path(path.groups): assert torch.equal(model(ids).logits, own)


def test_a_member_that_gets_another_tensor_computes_it():
    model = made()
    q,k,v = layers_of(model)[:3]
    x,other = torch.randn(1, 8, 64),torch.randn(1, 8, 64)
    own = [q(x), k(other), v(x)]
    with lora_path([[q, k, v]]):
        for l,y,z in zip((q, k, v), own, (x, other, x)): assert torch.allclose(l(z), y, atol=1e-6)
        q(x)
        x.mul_(2) # in place, after the others were computed
        assert torch.allclose(k(x), group_outputs([k], x)[0]) and not torch.allclose(k(x), own[1], atol=1e-3)
        assert torch.allclose(v(x), group_outputs([v], x)[0])


def test_a_pass_that_breaks_off_leaves_nothing_behind():
    model = made()
    path = proved(model)
    mlp = model.get_base_model().model.layers[0].mlp
    broken = mlp.up_proj.register_forward_pre_hook(lambda *a: 1/0)
    with lora_path(path.groups):
        with pytest.raises(ZeroDivisionError): loss_sum(model, ids, ids)
        broken.remove()
        ours = loss_and_gradients(model)[0]
    assert largest(ours, loss_and_gradients(model)[0])<1e-6


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_gives_the_same_bits(reentrant):
    model = made(lora_dropout=.1)
    path = proved(model)
    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        loss_sum(model, ids, ids)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]
    with lora_path(path.groups):
        without = gradients()
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        model.enable_input_require_grads()
        again = gradients()
    assert largest(again, without)<1e-6 and (reentrant or all(map(torch.equal, again, without)))


def test_compiled_code_is_pefts():
    model = made()
    path = proved(model)
    q = layers_of(model)[0]
    x = torch.randn(1, 8, 64)
    with lora_path(path.groups):
        compiled = torch.compile(lambda t: q(t), backend='eager', fullgraph=True)
        assert torch.allclose(compiled(x), q(x), atol=1e-6)


# --- what keeps peft's path, and is told

def with_two(model):
    model.add_adapter('second', model.peft_config['default'])
    return model


def hooked(model):
    for l in layers_of(model): l.base_layer._hf_hook = object()
    return model


def experts():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model('mixtral', **kinds['mixtral']))
    return add_lora(model, LoRAConfig(target_modules=[*attention, 'w1', 'w2', 'w3'], lora_dropout=0.)).train()


@pytest.mark.parametrize('model,told', [
    (lambda: made(use_dora=True), "adapters: peft's path (DoRA)"),
    (lambda: with_two(made()), "adapters: peft's path (several adapters)"),
    (lambda: hooked(made()), "adapters: peft's path (layers with a hook)")], ids=['dora', 'two', 'hooks'])
def test_why_peft_is_told(model, told):
    model = model()
    assert str(proved(model))==told
    assert {why_own_path(l) for l in layers_of(model)}=={told.split('(')[1][:-1]}


def test_experts_keep_pefts_path_beside_the_rest():
    path = proved(experts())
    assert path.names==['q_proj+k_proj+v_proj', 'o_proj'] and [*path.kept]==['experts']
    assert str(path).endswith('; by peft itself: 4 experts'), str(path)


@pytest.mark.parametrize('wrong', ['scale', 'mask', 'order', 'A', 'B', 'x', 'NaN'])
def test_a_wrong_path_is_found(wrong, monkeypatch):
    "Each mistake that the function could make ends on peft's path"
    model,m = made(lora_dropout=.2),path_module
    add,masked,both,back,dropped = m._add_product,m._masked,m._adapter_gradients,m._input_gradient,m._low_dropped
    def changed(*args):
        dA,dB,d = both(*args)
        return [g*1.0001 for g in dA] if wrong=='A' else dA,[g*1.0001 for g in dB] if wrong=='B' else dB,d
    monkeypatch.setattr(m, *{
        'scale': ('_add_product', lambda y, h, b, s: add(y, h, b, s*1.0001)),
        'NaN': ('_add_product', lambda y, h, b, s: add(y, h, b, float('nan'))),
        'mask': ('_masked', lambda x, how, masks, i: masked(x, how, [k.roll(1) for k in masks], i)),
        'order': ('_low_dropped', lambda *a: [part[::step] for part, step in zip(dropped(*a), (1, -1))]),
        'A': ('_adapter_gradients', changed), 'B': ('_adapter_gradients', changed),
        'x': ('_input_gradient', lambda *a: back(*a)*1.0001)}[wrong])
    path = proved(model)
    assert path.groups==[] or (wrong=='order' and all(len(g)==1 for g in path.groups))
    assert path.kept


def test_a_path_that_is_right_in_each_layer_and_wrong_in_the_model_is_found(monkeypatch):
    model,own = made(),path_module._Group.output
    monkeypatch.setattr(path_module._Group, 'output', lambda self, i, x: own(self, i, x)*(1+1e-5*(i==1)))
    path = proved(model)
    assert path.groups==[] and str(path)=="adapters: peft's path (layers would get results of others)"


def test_a_model_that_carries_roundings_far_is_allowed_what_peft_itself_does():
    "The embedded model has learned: its gradients move by many roundings where one layer moves by one"
    torch.manual_seed(0)
    model = add_lora(load_model('sage-tiny', torch.float32, 'cpu', None), LoRAConfig(lora_dropout=.1)).train()
    path = proved(model)
    assert path.kept=={} and path.group_difference<1e-6<path.model_difference<1e-3


def test_groups_are_layers_of_one_tensor():
    model = made('phi3')
    assert {len(g) for g,_ in shared_inputs(model, lambda: model(ids))}=={1} # qkv_proj and gate_up_proj are one already
    assert str(LoraPath(kept={'DoRA': 3}))=="adapters: peft's path (DoRA)"
