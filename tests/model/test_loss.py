"The loss in slices: number and gradients of plain cross-entropy, for any model, wrapped in anything, no logits kept"
import copy, importlib.util, math, multiprocessing, os, warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from quick import few, forked
from sage_finetune.model import loss as rooms
from sage_finetune.model.adapter import linear_names, ready_for_quantised_training
from sage_finetune.base.loading import load_model
from sage_finetune.model.loss import head_loss, head_rows, LogitTransform, loss_sum, mean_loss

small = dict(vocab_size=331, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2,
             max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
gpt = dict(vocab_size=331, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=8)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
kinds = dict(
    qwen2=small, llama=small, qwen3=small | dict(head_dim=8), qwen3_moe=small | experts | dict(head_dim=8),
    mistral=small, mixtral=small | dict(num_local_experts=4), phi=small, phi3=small,
    gemma=small | dict(head_dim=8), gemma2=small | dict(head_dim=8, final_logit_softcapping=5.),
    gemma3_text=small | dict(head_dim=8, num_hidden_layers=6), cohere=small | dict(logit_scale=.25),
    cohere2=small | dict(logit_scale=.25), granite=small | dict(logits_scaling=8.),
    granitemoe=small | dict(logits_scaling=8., num_local_experts=4), gpt2=gpt, gptj=gpt, gpt_neox=small,
    opt=small | dict(ffn_dim=64, word_embed_proj_dim=32),
    bloom=dict(vocab_size=331, hidden_size=32, n_layer=2, n_head=4), falcon=small, starcoder2=small, stablelm=small,
    olmo2=small, smollm3=small, glm4=small | dict(head_dim=8),
    gpt_oss=small | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6),
    mamba=dict(vocab_size=331, hidden_size=32, num_hidden_layers=2, state_size=8),
    falcon_h1=small | dict(mamba_d_ssm=32, mamba_n_heads=4, head_dim=8, mamba_d_head=8, mamba_n_groups=1,
                           mamba_d_state=8, mamba_chunk_size=8, lm_head_multiplier=.5))
layers = dict(gpt2=['c_attn'], mamba=['in_proj'], falcon_h1=['q_proj', 'v_proj'], gpt_oss=['q_proj', 'v_proj'])
after = dict(gemma2=LogitTransform(cap=5.), cohere=LogitTransform(.25), cohere2=LogitTransform(.25),
             granite=LogitTransform(1/8), granitemoe=LogitTransform(1/8), falcon_h1=LogitTransform(.5))


def tiny(kind='qwen2', **settings):
    "Random weights, and a head large enough for a bound or a factor to show"
    torch.manual_seed(0)
    try: config = AutoConfig.for_model(kind, **kinds[kind] | settings)
    except ValueError: pytest.skip(f'this version of transformers does not know {kind}')
    model = AutoModelForCausalLM.from_config(config)
    for p in model.get_output_embeddings().parameters(): p.data.normal_(std=.2)
    return model

def adapted(model, **settings):
    "With an adapter that changes something"
    model = get_peft_model(model, LoraConfig(**dict(
        r=4, lora_dropout=0., target_modules=linear_names(model), task_type='CAUSAL_LM') | settings))
    for n,p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.05)
    return model

def batch(rows=2, time=40, seed=1):
    "Ids, and labels with a prompt and padding that nobody learns"
    ids = torch.randint(3, 331, (rows, time), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for i in range(rows): labels[i, :30-7*(i%4)] = labels[i, 33+i:] = -100
    return ids,labels

def plain(model, ids, labels):
    "Cross-entropy over all logits"
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(),
                           reduction='sum')

def gap(model, ids, labels):
    "Largest relative difference to plain cross-entropy, of the loss and of the gradients"
    learned = [p for p in model.parameters() if p.requires_grad]
    ours,theirs = ((x.detach(), *torch.autograd.grad(x, learned))
                   for x in (loss_sum(model, ids, labels)[0], plain(model, ids, labels)))
    most = max(g.abs().max() for g in theirs[1:])
    return max(((a-b).abs().max()/(b.abs().max() if i==0 else most)).item() for i,(a,b) in enumerate(zip(ours, theirs)))

def way(model): return rooms._known[rooms._inside(model)][1]


@pytest.mark.parametrize('kind', kinds)
def test_every_kind_of_model_has_the_loss_and_gradients_of_plain_cross_entropy(kind):
    model = tiny(kind)
    model = adapted(model, **dict(target_modules=layers[kind]) if kind in layers else {})
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'sage|.*its logits are computed', UserWarning)
        assert gap(model.eval(), *batch()) < 1e-5
    assert way(model)==after.get(kind, LogitTransform())


@pytest.mark.parametrize('how', [dict(modules_to_save=['lm_head']), dict(target_modules=['q_proj', 'lm_head']),
                                 dict(target_modules=['q_proj', 'lm_head'], use_dora=True)])
@pytest.mark.parametrize('kind', ['qwen2', 'gemma2'])
def test_a_head_that_is_trained_gets_its_gradients_slice_by_slice(kind, how, monkeypatch):
    monkeypatch.setattr(rooms, 'head_bytes', dict(cpu=0)) # slices of 16 tokens
    model = adapted(tiny(kind, tie_word_embeddings=False), **how)
    assert any('lm_head' in n for n,p in model.named_parameters() if p.requires_grad)
    assert gap(model, *batch(4)) < 1e-5


def test_all_weights_trained_and_the_head_tied_to_the_embedding():
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight and gap(model, *batch()) < 1e-5


@pytest.mark.parametrize('tokens', [1, 15, 16, 17, 33, 64])
def test_slices_of_any_length(tokens, monkeypatch):
    monkeypatch.setattr(rooms, 'head_bytes', dict(cpu=0))
    torch.manual_seed(0)
    head,h,t = (torch.nn.Linear(8, 50).requires_grad_(False),torch.randn(tokens, 8, requires_grad=True),
                torch.randint(50, (tokens,)))
    (a,), (b,) = (torch.autograd.grad(x*3, h)
                  for x in (head_loss(h, t, head), F.cross_entropy(head(h), t, reduction='sum')))
    assert head_rows(50)==16 and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('trained', [False, True])
@pytest.mark.parametrize('kind', ['qwen2', 'gemma2'])
def test_nothing_of_the_size_of_the_vocabulary_is_kept(kind, trained):
    model,shapes = (adapted(tiny(kind, tie_word_embeddings=False),
                            **dict(modules_to_save=['lm_head']) if trained else {}),set())
    loss_sum(model, *batch())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.add(tuple(x.shape)) or x, lambda x: x):
        loss_sum(model, *batch())
        assert shapes and not [s for s in shapes if 331 in s]
        shapes.clear()
        plain(model, *batch())
        assert [s for s in shapes if 331 in s]


@pytest.mark.parametrize('split', [1, 2, 4])
def test_any_split_of_the_batch_gives_the_same_gradients(split):
    model,(ids,labels) = adapted(tiny()),batch(4)
    learned = [p for p in model.parameters() if p.requires_grad]
    n = (labels[:, 1:]!=-100).sum()
    whole = torch.autograd.grad(loss_sum(model, ids, labels)[0]/n, learned)
    parts = [torch.autograd.grad(loss_sum(model, i, l)[0]/n, learned)
             for i,l in zip(ids.split(split), labels.split(split))]
    for w,*p in zip(whole, *parts): assert torch.allclose(w, sum(p), atol=1e-5)


@pytest.mark.parametrize('how', [{}, dict(modules_to_save=['lm_head'])])
def test_nothing_to_learn_gives_zeros(how):
    model,(ids,labels) = adapted(tiny(tie_word_embeddings=False), **how),batch()
    total,n = loss_sum(model, ids, torch.full_like(labels, -100))
    total.backward()
    assert (total==0 and n==0 and all(p.grad is not None and not p.grad.any() for p in model.parameters()
                                      if p.requires_grad))
    assert math.isnan(mean_loss(model, [dict(input_ids=ids, labels=torch.full_like(labels, -100))]))


@pytest.mark.parametrize('dtype', few([torch.bfloat16, torch.float16]))
def test_low_precision_reports_the_true_loss(dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 8192, bias=False, dtype=dtype).requires_grad_(False)
    h,t = (3*torch.randn(2048, 64)).to(dtype).requires_grad_(),torch.randint(8192, (2048,))
    true = F.cross_entropy(F.linear(h.float(), head.weight.float()), t, reduction='sum')
    ours = head_loss(h, t, head)
    assert ours.dtype==torch.float32 and abs(ours-true).item()/2048 < 1e-3
    even = torch.nn.Linear(64, 8192, bias=False, dtype=dtype).requires_grad_(False)
    even.weight.zero_()
    assert head_loss(h, t, even).item()/2048==pytest.approx(math.log(8192), abs=1e-4) # 9.0109, in bfloat16 9.0
    (a,), (b,) = (torch.autograd.grad(x, h) for x in (ours, true))
    assert a.dtype==dtype and (a.float()-b.float()).norm()/b.norm() < .01


def test_the_whole_model_in_bfloat16():
    model,(ids,labels) = load_model('sage-tiny').eval(),batch(4, 120)
    true,n = loss_sum(model, ids, ids)
    low = loss_sum(copy.deepcopy(model).bfloat16(), ids, ids)[0]
    theirs = plain(copy.deepcopy(model).bfloat16(), ids, ids)
    assert abs(low-true)/n <= max(1e-3, 1.1*abs(theirs-true)/n)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_automatic_precision(dtype):
    model,(ids,labels) = adapted(tiny()),batch()
    with torch.autocast('cpu', dtype=dtype): ours,theirs = loss_sum(model, ids, labels)[0],plain(model, ids, labels)
    ours.backward()
    assert abs(ours-theirs)/theirs < 3e-3 and ours.dtype==torch.float32
    assert (way(model)==LogitTransform() and all(p.grad.dtype==torch.float32 for p in model.parameters()
                                                 if p.requires_grad))


@pytest.mark.parametrize('reentrant', [False, True])
def test_recomputed_activations(reentrant):
    model = adapted(tiny()).train()
    whole = gap(model, *batch())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    total = loss_sum(model, *batch())[0]
    total.backward()
    mine = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.gradient_checkpointing_disable()
    theirs = torch.autograd.grad(plain(model, *batch()), [p for p in model.parameters() if p.requires_grad])
    assert whole < 1e-5 and all(torch.allclose(a, b, atol=1e-4) for a,b in zip(mine, theirs))


def test_the_model_is_as_before():
    "Modes, random numbers, its own forward and what a copy computes"
    model,(ids,labels) = adapted(tiny(), lora_dropout=.5).train(),batch()
    model.base_model.model.model.layers[0].eval()
    modes,numbers = [m.training for m in model.modules()],torch.get_rng_state()
    rooms.head_and_transform(model, ids)
    assert modes==[m.training for m in model.modules()] and torch.equal(numbers, torch.get_rng_state())
    loss_sum(model, ids, labels)
    head = model.base_model.model.lm_head
    assert 'forward' not in head.__dict__ and model(input_ids=ids).logits.shape==(2, 40, 331)
    with pytest.raises(IndexError): loss_sum(model, ids+331, labels)
    assert 'forward' not in head.__dict__ and not rooms._answers
    twin = copy.deepcopy(model).eval()
    twin.base_model.model.lm_head.weight.data.zero_()
    assert loss_sum(twin, ids,
                    labels)[0].item()==pytest.approx((labels[:, 1:]!=-100).sum().item()*math.log(331), rel=1e-5)


def test_a_head_that_another_library_has_hooked():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    model = adapted(tiny())
    add_hook_to_module(model.base_model.model.lm_head, AlignDevicesHook(io_same_device=True))
    theirs = model.base_model.model.lm_head.forward
    assert gap(model, *batch()) < 1e-5 and model.base_model.model.lm_head.forward is theirs


def test_a_new_head_is_looked_at_anew():
    model = tiny(tie_word_embeddings=False).requires_grad_(False)
    loss_sum(model, *batch())
    model.lm_head = torch.nn.Linear(32, 331)
    assert gap(model, *batch()) < 1e-5 and rooms._known[model][0] is model.lm_head


@pytest.mark.slow # a compiled run is in `test_loop`
def test_a_compiled_model_is_compiled_once_for_each_shape():
    from torch._dynamo.testing import CompileCounter
    model,counter = adapted(tiny()),CompileCounter()
    compiled = torch.compile(model, backend=counter)
    first = loss_sum(compiled, *batch())[0]
    before = counter.frame_count
    assert before > 0 # it was compiled
    for seed in (2, 3): loss_sum(compiled, *batch(seed=seed))
    assert counter.frame_count==before and way(compiled)==LogitTransform()
    first.backward()
    theirs = torch.autograd.grad(plain(model, *batch()), [p for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(p.grad, g, atol=1e-4)
               for p,g in zip([p for p in model.parameters() if p.requires_grad], theirs))
    assert compiled(input_ids=batch()[0]).logits.shape==(2, 40, 331)


@pytest.mark.skipif(not importlib.util.find_spec('bitsandbytes'), reason='bitsandbytes is not installed')
def test_quantised_weights():
    "An evaluation before and between changes no gradient, though bitsandbytes repacks weights in it on CPUs with bf16"
    model = load_model('sage-tiny', torch.float32, 'cpu', BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.float32))
    model,(ids,labels) = (adapted(ready_for_quantised_training(model), target_modules=['q_proj', 'v_proj']).train(),
                          batch())
    assert gap(model, ids, labels) < 1e-5
    learned = [p for p in model.parameters() if p.requires_grad]
    before = torch.autograd.grad(loss_sum(model, ids, labels)[0], learned)
    mean_loss(model, [dict(input_ids=ids, labels=labels)])
    assert all(torch.equal(a, b) for a,b in zip(before, torch.autograd.grad(loss_sum(model, ids, labels)[0], learned)))


def _shared_gap(kind, rank):
    "Largest difference of a gradient to the mean of the gradients that both processes would have alone"
    model = adapted(tiny(tie_word_embeddings=False), **dict(modules_to_save=['lm_head']) if kind=='trained' else {})
    learned,(ids,labels) = [p for p in model.parameters() if p.requires_grad],batch(2, seed=7)
    if kind=='nothing': labels[1] = -100
    alone = [torch.autograd.grad(plain(model, ids[r:r+1], labels[r:r+1]), learned) for r in (0, 1)]
    how = dict(unused=dict(find_unused_parameters=True), static=dict(static_graph=True)).get(kind, {})
    shared = torch.nn.parallel.DistributedDataParallel(model, **how)
    for _ in range(2): # a static graph is another one from the second pass on
        model.zero_grad()
        loss_sum(shared, ids[rank:rank+1], labels[rank:rank+1])[0].backward()
    apart = max((a-b).abs().max().item() for a,b in zip(*alone))
    return max((p.grad-(a+b)/2).abs().max().item() for p,a,b in zip(learned, *alone))/apart


def _worker(rank, port, queue):
    import torch.distributed as dist
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    for kind in ('frozen', 'trained', 'unused', 'static', 'nothing'): queue.put((kind, _shared_gap(kind, rank)))
    dist.destroy_process_group()


def test_two_processes_average_their_gradients():
    "With a frozen and a trained head, both ways in which torch looks for unused weights, one process without targets"
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    processes = forked or multiprocessing.get_context('spawn')
    queue = processes.SimpleQueue()
    both = [processes.Process(target=_worker, args=(rank, port, queue)) for rank in range(2)]
    for process in both: process.start()
    for process in both: process.join(120)
    assert [process.exitcode for process in both]==[0, 0]
    found = [queue.get() for _ in range(10)]
    assert not [f for f in found if not f[1]<1e-5]
