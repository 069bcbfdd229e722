"What a model computes on cards that are not here: kernels as each torch has them, number formats, sizes"
import inspect
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from cards import CARDS, T4
from quick import few, two_layers
from sage_finetune.config import fit_config, LoRAConfig, precision_of, PresetConfigs, TrainingConfig
from sage_finetune.core.machine import Machine, model_parameters, step_room
from sage_finetune.base import attention
from sage_finetune.model import loss
from sage_finetune.model.adapter import add_lora, ready_for_quantised_training
from sage_finetune.base.attention import documents, repeat_heads, shares_heads, use_documents
from sage_finetune.base.loading import load_model
from sage_finetune.model.loss import loss_sum
from sage_finetune.model.memory import estimate_memory
from sage_finetune.training.packing import check_packing, prove_packing
from test_memory import CODER, SHAPES

IDS = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[*range(9), *range(15)], [*range(2), *range(1), *range(21)]])

# Kernels, with the signatures that torch 2.10 to 2.13 give them

def plain(q, k, v, ends, scale, width):
    assert q.dtype in (torch.float16, torch.bfloat16), 'FlashAttention only supports fp16 and bf16'
    out = []
    for a,b in zip(ends[:-1].tolist(), ends[1:].tolist()):
        Q,K,V = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        K,V = (t.repeat_interleave(Q.shape[1]//t.shape[1], 1) for t in (K, V))
        T = b-a
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if width>=0: seen = seen.triu(-width)
        out.append(F.scaled_dot_product_attention(Q, K, V, seen, scale=scale)[0].transpose(0, 1))
    return torch.cat(out)

def same_heads(q, k): assert q.shape[1]==k.shape[1], 'Expect query and key/value to have the same number of heads'

def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    same_heads(query, key)
    return plain(query, key, value, cu_seq_q, None, -1)

def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1)):
    same_heads(query, key)
    return plain(query, key, value, cu_seq_q, scale, window_size[0])

def varlen_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False):
    if not enable_gqa: same_heads(query, key)
    return plain(query, key, value, cu_seq_q, scale, window_size[0])

def varlen_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    return varlen_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
                       enable_gqa=enable_gqa)

KERNELS = varlen_2_10, varlen_2_11, varlen_2_12, varlen_2_13

@pytest.fixture(params=KERNELS, ids=lambda k: k.__name__)
def ampere(request):
    "A card of capability 8.0 with the kernel of one version of torch"
    import torch.nn.attention.varlen as varlen
    fits = attention._kernel_fits
    on_card = lambda m: fits(SimpleNamespace(device=torch.device('cuda'), dtype=m.dtype, config=m.config))
    half = patch.object(attention, 'autocast_dtype', lambda device: torch.bfloat16)
    with (patch.object(varlen, 'varlen_attn', request.param), half,
          patch.object(torch.cuda, 'get_device_capability', lambda *a: (8, 0)),
          patch.object(attention, '_kernel_fits', on_card),
          patch.object(attention, '_one_by_one', attention._at_once)):
        yield request.param

def test_the_kernel_of_this_torch_is_known():
    from torch.nn.attention.varlen import varlen_attn
    takes = {*inspect.signature(varlen_attn).parameters}
    assert takes & {'window_size', 'is_causal'} and {'cu_seq_q', 'max_q'}<=takes

def random_model(kind, **more):
    torch.manual_seed(0)
    small = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small | more)).eval()
    for p in model.parameters(): p.requires_grad_(False)
    return model

def logits(model):
    with torch.autocast('cpu', torch.bfloat16), documents(POSITIONS):
        return model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits.float()

@pytest.mark.parametrize('bits', [16, 8, 4])
def test_packing_takes_the_kernel_of_any_torch_and_bits(ampere, bits):
    "G2, G3: hidden states of a quantised model are in 32 bits, and the kernel takes 16"
    how = {8: BitsAndBytesConfig(load_in_8bit=True),
           4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)}.get(bits)
    model = ready_for_quantised_training(load_model(two_layers, torch.bfloat16, quantisation=how)).eval()
    masked = logits(model)
    assert prove_packing(model, 2, torch.bfloat16)==''
    assert model.config._attn_implementation=='documents'
    apart = logits(model)
    assert (apart-masked).abs().max()<masked.abs().max()*.05

@pytest.mark.parametrize('kind,more,needs', [
    ('qwen2', {}, ()), ('gemma3_text', dict(sliding_window=4, query_pre_attn_scalar=8), ('window_size',)),
    ('gemma3_text', dict(query_pre_attn_scalar=4, layer_types=['full_attention']*2), ('scale',))])
def test_what_a_kernel_cannot_be_told_keeps_its_mask_and_is_told(ampere, kind, more, needs):
    model = random_model(kind, **more)
    masked = logits(model)
    why = prove_packing(model, 2, torch.bfloat16)
    able = {*needs}<={*inspect.signature(ampere).parameters}
    assert (why=='')==able and (model.config._attn_implementation=='documents')==able
    assert able or 'varlen_attn of torch' in why
    assert (logits(model)-masked).abs().max()<masked.abs().max()*.05

def test_packing_without_any_kernel_says_so():
    model = random_model('qwen2')
    with patch.object(attention, '_kernel_fits', lambda m: False):
        assert 'no kernel of this machine' in prove_packing(model, 2)
    check_packing(model, 2)

# G5: heads of keys and values that a fused kernel does not share

class Asked(TorchFunctionMode):
    "What torch's attention was asked for"
    def __init__(self): self.seen = []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append((bool((kwargs or {}).get('enable_gqa')), args[0].shape[1]==args[1].shape[1]))
        return func(*args, **(kwargs or {}))

def on_card(model, capability, dtype=None):
    with (patch.object(type(model), 'device', torch.device('cuda')),
          patch.object(torch.cuda, 'get_device_capability', lambda *a: capability)):
        return repeat_heads(model, dtype)

@pytest.mark.parametrize('kind,more', [('qwen2', {}), ('llama', {}), ('qwen3', {}),
                                       ('mistral', dict(sliding_window=5))])
def test_a_t4_is_never_asked_to_share_heads(kind, more):
    model,left = random_model(kind, **more),torch.tensor([[0]*4+[1]*20, [1]*24])
    calls = [dict(input_ids=IDS, use_cache=False), dict(input_ids=IDS, attention_mask=left),
             dict(input_ids=IDS, position_ids=POSITIONS, use_cache=False)]
    def outputs():
        found = [model(**c).logits for c in calls]
        first = model(input_ids=IDS, use_cache=True)
        return [*found, model(input_ids=IDS[:, :1], past_key_values=first.past_key_values).logits]
    before = outputs()
    assert on_card(model, (7, 5), torch.float16) and model.config._attn_implementation=='repeated_heads'
    with Asked() as asked: after = outputs()
    assert not any(shared for shared,_ in asked.seen) and all(alike for _,alike in asked.seen)
    for a,b in zip(before, after): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('capability,dtype,repeats', [
    ((7, 5), torch.float16, True), ((7, 0), torch.float16, True), ((6, 1), torch.float32, True),
    ((8, 0), torch.bfloat16, False), ((8, 9), torch.float16, False), ((9, 0), torch.float32, True),
    ((12, 0), torch.bfloat16, False)])
def test_heads_are_repeated_where_no_fused_kernel_shares_them(capability, dtype, repeats):
    assert shares_heads(capability, dtype)!=repeats
    assert on_card(random_model('qwen2'), capability, dtype)==repeats

def test_what_needs_no_repetition_is_left_alone():
    assert not on_card(random_model('qwen2', num_key_value_heads=4), (7, 5)) # not grouped
    eager = AutoModelForCausalLM.from_config(random_model('qwen2').config, attn_implementation='eager')
    assert not on_card(eager, (7, 5))

def test_only_the_language_part_of_a_vision_model_repeats(tmp_path):
    from sage_finetune.base.tiny_vision import tiny_vision_model
    model = load_model(str(tiny_vision_model(tmp_path/'vision')))
    text = model.config.get_text_config()
    grouped = text.num_key_value_heads!=text.num_attention_heads
    vision = model.config.vision_config._attn_implementation
    assert on_card(model, (7, 5), torch.float16)==grouped
    assert model.config.vision_config._attn_implementation==vision
    assert text._attn_implementation==('repeated_heads' if grouped else 'sdpa')

# G1, G4, G8: bits

@pytest.mark.parametrize('storage', [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('computes', [torch.bfloat16, torch.float16])
def test_packed_bytes_stay_packed(storage, computes):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=computes,
                             bnb_4bit_quant_storage=storage)
    model = load_model(two_layers, computes, 'cpu', how)
    packed = lambda: {n: (p.dtype, p.nbytes) for n,p in model.named_parameters() if type(p).__name__=='Params4bit'}
    before = packed()
    ready_for_quantised_training(model)
    assert before and packed()==before and {d for d,_ in before.values()}=={storage}
    assert all(p.dtype==torch.float32 for n,p in model.named_parameters() if 'norm' in n)
    with torch.no_grad(): assert model(input_ids=IDS).logits.isfinite().all()

class Products(TorchDispatchMode):
    "Number formats of the large products"
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ('aten::mm', 'aten::addmm', 'aten::bmm'):
            tensors = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if all(min(t.shape)>16 for t in tensors[-2:]): self.seen.append(tensors[-1].dtype)
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('how', [dict(), dict(use_dora=True), dict(target_modules='all-linear')])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_eight_bits_go_backward_in_sixteen_and_keep_nothing(half, how, checkpointing):
    import bitsandbytes.autograd._functions as functions
    model = load_model(two_layers, half, 'cpu', BitsAndBytesConfig(load_in_8bit=True))
    model = add_lora(ready_for_quantised_training(model), LoRAConfig(r=4, lora_dropout=0, **how)).train()
    if checkpointing: model.gradient_checkpointing_enable(dict(use_reentrant=False))
    nodes,own = [],functions.MatMul8bitLt.forward
    def watched(ctx, x, *args): # the CPU's own rounding puts outliers aside in place, that of cards does not
        nodes.append(ctx)
        return own(ctx, x.clone(), *args)
    with (patch.object(functions, 'MatMul8bitFp', functions.MatMul8bitLt),
          patch.object(functions.MatMul8bitLt, 'forward', staticmethod(watched))):
        with torch.autocast('cpu', half): z = model(input_ids=IDS).logits
        assert nodes and all(t is None for n in nodes if hasattr(n, 'tensors') for t in n.tensors)
        with Products() as products: z.float().logsumexp(-1).sum().backward()
    assert products.seen and products.seen.count(half)>len(products.seen)/2
    assert torch.float32 not in products.seen or how.get('use_dora') # DoRA measures lengths in 32 bits
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

def test_eight_bits_need_less_than_sixteen_and_more_than_four():
    "G8, by the count"
    peak = lambda tokens,**how: estimate_memory(
        TrainingConfig(**dict(dict(bf16=True, max_length=tokens), **how)), CARDS[-1], CODER).peak
    for tokens in (1024, 4096):
        four,eight,plain = (peak(tokens, **how) for how in (dict(load_in_4bit=True), dict(load_in_8bit=True),
                                                            dict(load_in_8bit=False)))
        assert four<eight<plain

# G9, G13

class NoDoubles(TorchFunctionMode):
    "As on an Apple GPU: what was not brought to the CPU cannot be made 64 bits wide"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = func is torch.Tensor.double or func is torch.Tensor.to and torch.float64 in args
        if wide and not getattr(args[0], '_on_cpu', False):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu: out._on_cpu = True
        return out

@pytest.mark.parametrize('kind,more', [('qwen2', {}), ('gemma2', {}), ('cohere', {})])
def test_no_double_is_made_on_the_device(kind, more):
    model = random_model(kind, **more)
    loss._known.clear()
    with NoDoubles(): total,n = loss_sum(model, IDS, IDS)
    assert total.isfinite() and n==IDS.numel()-len(IDS)
    with pytest.raises(TypeError, match='float64'), NoDoubles(): torch.ones(1).double()

def learned(model, half, cast):
    context = nullcontext() if half is None else torch.autocast('cpu', half)
    for layer in model.modules():
        if cast: vars(layer).pop('_cast_input_dtype', None) # as peft has it
    model.zero_grad()
    with context: total = loss_sum(model, IDS, IDS)[0]
    total.backward()
    return total.item(),[p.grad.clone() for p in model.parameters() if p.requires_grad]

@pytest.mark.parametrize('half', [None, torch.bfloat16])
def test_the_input_of_an_adapter_is_not_cast_to_and_fro(half):
    dtype = half or torch.float32
    model = add_lora(load_model(two_layers, dtype), LoRAConfig(lora_dropout=0.0, target_modules='all-linear')).train()
    for n,p in model.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .02)
    (one,grads),(two,others) = learned(model, half, False),learned(model, half, True)
    assert one==two and all(torch.equal(a, b) for a,b in zip(grads, others))

# Point 6: twelve cards

_counts = {}

def counted(config, card, shape=CODER):
    "`estimate_memory`, once for what is computed alike"
    fitted = fit_config(config, card)[0]
    key = str(fitted.to_dict()),card.bf16,id(shape)
    if key not in _counts: _counts[key] = estimate_memory(config, card, shape)
    return replace(_counts[key], config=fitted, machine=card)

@pytest.mark.parametrize('name', few(sorted(SHAPES, key=lambda n: n!='Qwen2.5-7B')))
def test_the_rule_of_thumb_is_above_the_count(name):
    shape,billions = SHAPES[name]
    all_linear = dict(lora=LoRAConfig(r=64, target_modules='all-linear'))
    for settings in (dict(max_length=4096), dict(gradient_checkpointing=False) | all_linear,
                     dict(load_in_4bit=True), dict(load_in_8bit=True)):
        c = TrainingConfig(**dict(dict(bf16=True, load_in_8bit=False, optim='adamw_torch'), **settings))
        peak = counted(c, Machine('cuda', bf16=True), shape).peak
        bits = 8 if c.load_in_8bit else 4 if c.load_in_4bit else 16
        judged = step_room(int(billions*1e9), bits, c.max_length, c.gradient_checkpointing, c.lora.r,
                           c.lora.target_modules=='all-linear')
        assert peak<=judged*1.01, (settings, peak/1e9, judged/1e9)

def _fitted(card):
    "(name, fitted config, estimate) of the default and of the preset that suits a card"
    from sage_finetune.config import preset_for
    for name,config in (('default', TrainingConfig()), (preset_for(card), PresetConfigs.auto(card))):
        yield name,config,counted(config, card)

def test_twelve_cards(capsys):
    "What the default model gets on each card, and that it fits there by the count"
    with capsys.disabled(): print(f'\n{"card":12} {"free":>6} {"settings":10} format weights rows  estimate')
    for card in CARDS:
        for name,asked,e in _fitted(card):
            c = e.config
            bits = 8 if c.load_in_8bit else 4 if c.load_in_4bit else 16
            with capsys.disabled():
                print(f'{card.name:12} {card.free/1e9:5.1f}G {name:10} {precision_of(c):6} {bits:2} bits '
                      f'{c.per_device_train_batch_size}×{c.gradient_accumulation_steps:<3} {e.peak/1e9:5.1f} GB')
            assert e.fits() and (c.bf16, c.fp16)==(card.bf16, not card.bf16)
            assert (c.effective_batch_size, c.max_length, c.optim)==(
                asked.effective_batch_size, asked.max_length, 'adamw_torch_fused')
            if name!='default': assert e.peak<=PresetConfigs.fits_in[name]*1e9
            wider = asked.replace(load_in_8bit=False, load_in_4bit=False)
            if bits!=16: # only where 16 do not fit
                assert step_room(model_parameters(c.model_name), 16, c.max_length)>card.free
                assert e.peak<counted(wider, card).peak

def test_other_models_get_the_bits_that_fit():
    bits = lambda c: 8 if c.load_in_8bit else 4 if c.load_in_4bit else 16
    fitted = lambda name: {c.name: fit_config(TrainingConfig(model_name=f'maker/{name}'), c)[0] for c in CARDS}
    seven,four = fitted('Qwen2.5-7B'),fitted('Qwen2.5-14B')
    assert [bits(c) for c in fitted('Qwen2.5-0.5B').values()]==[16]*12
    some = 'RTX 3050', 'RTX 3060', 'Tesla T4', 'L4', 'RTX 4090', 'H200'
    assert [bits(seven[n]) for n in some]==[4, 8, 8, 16, 16, 16]
    assert [bits(four[n]) for n in ('Tesla T4', 'RTX 4090', 'A100 40 GB')]==[4, 8, 16]
    config,shape = TrainingConfig(model_name='maker/Qwen2.5-7B'),SHAPES['Qwen2.5-7B'][0]
    for card in CARDS[4:]: assert counted(config, card, shape).fits()
    unknown = {bits(c) for c in fitted('Phi-3.5-mini').values()} # neither files nor name tell its size
    assert unknown=={8}

def test_what_is_asked_for_by_hand_stands():
    wishes = [dict(load_in_8bit=True), dict(load_in_4bit=True), dict(fp16=True), dict(optim='paged_adamw_8bit'),
              dict(bf16=False), dict(fp16=False), dict(optim='adamw_torch'), dict(gradient_checkpointing=True)]
    for card in CARDS:
        for wish in wishes:
            fitted,changes = fit_config(TrainingConfig(**wish), card)
            assert {k: getattr(fitted, k) for k in wish}==wish, (card.name, wish)
            assert not any(c.by_hand for c in changes)
    on_t4,changes = fit_config(TrainingConfig(bf16=True), T4)
    assert on_t4.fp16 and [c.setting for c in changes if c.by_hand]==['bf16']

def test_the_free_memory_decides():
    full = Machine('cuda', 'RTX 4090', memory=25*10**9, free=4*10**9, bf16=True)
    assert fit_config(TrainingConfig(), full)[0].load_in_8bit
    e = estimate_memory(PresetConfigs.rtx_4090(), full, CODER)
    assert not e.fits() and 'of 3.7 GiB' in str(e).replace('there are', 'of')
    assert not fit_config(TrainingConfig(), Machine('cuda', memory=25*10**9, bf16=True))[0].load_in_8bit
