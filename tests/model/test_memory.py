"The count of memory: large shapes, other machines and models, real steps"
import copy, dataclasses, json, re, subprocess, sys, time
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers import (Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, OPTConfig,
                          Qwen2Config, Qwen3Config, Qwen3MoeConfig)

from quick import chequered, few, forked, run_in_fork, two_layers
from sage_finetune.config import fit_config, LoRAConfig, PresetConfigs, SageError, TrainingConfig
from sage_finetune.core.machine import Machine
from sage_finetune.model.step_bytes import (attention_kernel, build_on_meta, count_run, live_bytes, packed_bytes,
                                            step_bytes)
from sage_finetune.model import step_bytes as counting
from sage_finetune.model.lora_path import lora_path, prove_lora_path
from sage_finetune.model.loss import evaluating
from sage_finetune.model.memory import estimate_memory, optimizer_bytes, probe_step
from sage_finetune.training.batches import longest_batch

H200,A100,T4 = (Machine('cuda', 'H200', memory=141*10**9, bf16=True),
                Machine('cuda', 'A100', memory=40*2**30, bf16=True),Machine('cuda', 'T4', memory=15*2**30))
CODER = Qwen2Config(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                    intermediate_size=8960, vocab_size=151_936,
                    tie_word_embeddings=True)
DENSE = dict(load_in_8bit=False, bf16=True, optim='adamw_torch')

def shape(kind, hidden, layers, heads, kv, ffn, vocabulary, tied, **more):
    return kind(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                intermediate_size=ffn,
                vocab_size=vocabulary, tie_word_embeddings=tied, **more)

# name → shape, billions of parameters as its makers give them
SHAPES = {
    'Qwen2.5-0.5B': (shape(Qwen2Config, 896, 24, 14, 2, 4864, 151_936, True), 0.49), 'Qwen2.5-1.5B': (CODER, 1.54),
    'Qwen2.5-3B': (shape(Qwen2Config, 2048, 36, 16, 2, 11_008, 151_936, True), 3.09),
    'Qwen2.5-7B': (shape(Qwen2Config, 3584, 28, 28, 4, 18_944, 152_064, False), 7.62),
    'Qwen2.5-14B': (shape(Qwen2Config, 5120, 48, 40, 8, 13_824, 152_064, False), 14.8),
    'Qwen2.5-32B': (shape(Qwen2Config, 5120, 64, 40, 8, 27_648, 152_064, False), 32.8),
    'Qwen2.5-72B': (shape(Qwen2Config, 8192, 80, 64, 8, 29_568, 152_064, False), 72.7),
    'Llama-3.2-1B': (shape(LlamaConfig, 2048, 16, 32, 8, 8192, 128_256, True), 1.24),
    'Llama-3.1-8B': (shape(LlamaConfig, 4096, 32, 32, 8, 14_336, 128_256, False), 8.03),
    'Llama-3.1-70B': (shape(LlamaConfig, 8192, 80, 64, 8, 28_672, 128_256, False), 70.6),
    'Gemma-2-2B': (shape(Gemma2Config, 2304, 26, 8, 4, 9216, 256_000, True, head_dim=256), 2.61),
    'Gemma-3-1B': (shape(Gemma3TextConfig, 1152, 26, 4, 1, 6912, 262_144, True, head_dim=256), 1.0)}

quick = 'Qwen2.5-0.5B', 'Llama-3.1-8B', 'Gemma-3-1B' # one of each maker

@pytest.mark.parametrize('name', [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES])
def test_large_shapes(name):
    config,billions = SHAPES[name]
    began = time.perf_counter()
    e = estimate_memory(PresetConfigs.rtx_3060(**DENSE), H200, config)
    seconds = time.perf_counter()-began
    print(f'{name}: {e.peak/2**30:.1f} GiB in {seconds:.1f} s')
    assert sum(e.weights.values())/2e9==pytest.approx(billions, rel=0.01)
    assert seconds<30 # 5 on a quiet machine

def plain_run(words): return subprocess.run(words, capture_output=True, text=True, timeout=300)

@pytest.mark.slow # a lesson of the notebook counts its shape
def test_the_largest_needs_little_time_and_memory():
    code = """if 1:
        import resource, time
        from transformers import AutoModelForCausalLM, Qwen2Config
        import peft, sage_finetune.model.loss, sage_finetune.model.adapter
        from sage_finetune.model.memory import estimate_memory, Machine, TrainingConfig
        config = Qwen2Config(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
                             num_key_value_heads=8, intermediate_size=29_568, vocab_size=152_064)
        began = time.perf_counter()
        e = estimate_memory(TrainingConfig(load_in_4bit=True, lora=dict(target_modules='all-linear')),
                            Machine('cuda', bf16=True), config)
        import pathlib, re, sys
        status = pathlib.Path('/proc/self/status') # `ru_maxrss` of a child begins with what its parent had
        host = (int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])*1024 if status.exists()
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(e.peak, time.perf_counter()-began, host)
    """
    done = (run_in_fork if forked else plain_run)([sys.executable, '-W', 'ignore', '-c', code])
    assert done.returncode==0, done.stderr
    peak,seconds,host = map(float, done.stdout.split())
    print(f'72B: {peak/2**30:.1f} GiB counted in {seconds:.1f} s with {host/2**30:.2f} GiB of main memory, '
          f'libraries included')
    assert host<1e9 and seconds<60 # 5 on a quiet machine

SMALL = dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=160, vocab_size=512)

@pytest.mark.parametrize('kind', few([GPT2Config, Gemma3TextConfig, Qwen3MoeConfig, LlamaConfig, Qwen3Config,
                                       Gemma2Config, MistralConfig, OPTConfig]))
def test_few_layers_give_all(kind):
    "A line through few layers is the count of all layers"
    small = (dict(n_embd=64, n_layer=6, n_head=4, vocab_size=512) if kind is GPT2Config else \
            dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, ffn_dim=160, vocab_size=512,
                 word_embed_proj_dim=64) if kind is OPTConfig else SMALL)
    lora = LoRAConfig() if kind is Qwen3MoeConfig else LoRAConfig(target_modules='all-linear')
    machines = [H200] if kind is Qwen3MoeConfig else [T4, Machine()] # experts are multiplied in bf16 only
    for settings in (dict(), dict(gradient_checkpointing=False), dict(packing=True))[:3 if kind is LlamaConfig else 2]:
        for machine in machines:
            c = fit_config(TrainingConfig(load_in_8bit=False, bf16=True, max_length=64,
                                          per_device_train_batch_size=2, lora=lora, **settings), machine)[0]
            model = build_on_meta(c, kind(**small))[0]
            line,full = (step_bytes(model, c, machine, exact=exact) for exact in (False, True))
            assert line==full and min(full.activations, full.head, full.layer)>0

def test_less_of_anything_is_less():
    base = dict(max_length=512, per_device_train_batch_size=4, gradient_checkpointing=False, **DENSE)
    small = shape(Qwen2Config, 1536, 6, 12, 2, 8960, 151_936, True)
    def peak(machine=H200, **changes): return estimate_memory(TrainingConfig(**(base|changes)), machine, small).peak
    whole = peak()
    smaller = dict(batch=dict(per_device_train_batch_size=2), length=dict(max_length=256),
                   checkpointing=dict(gradient_checkpointing=True),
                   rank=dict(lora=LoRAConfig(r=2)))
    for name,changes in smaller.items(): assert peak(**changes)<whole, name
    assert peak(load_in_4bit=True, gradient_checkpointing=True)<peak(gradient_checkpointing=True)
    assert peak(T4)>whole and peak(lora=LoRAConfig(target_modules='all-linear'))>whole

def test_a_count_is_remembered_for_what_changes_none_and_for_nothing_else(monkeypatch):
    "Each setting that is not part of the key is changed to something that cannot be read: the count does without it"
    shape,machine = Qwen2Config(**SMALL),Machine()
    config = fit_config(TrainingConfig(load_in_8bit=False, max_length=64), machine)[0]
    first = count_run(config, machine, shape)
    class Blind(TrainingConfig):
        def __getattribute__(self, name):
            if name in counting._no_bytes: raise AssertionError(f'`{name}` is read by a count')
            return super().__getattribute__(name)
    assert counting._no_bytes<{f.name for f in dataclasses.fields(TrainingConfig)}
    blind = copy.copy(config)
    object.__setattr__(blind, '__class__', Blind)
    assert counting._count_run(blind, machine, shape, None)==first
    assert count_run(config.replace(seed=7, output_dir='elsewhere'), machine, Qwen2Config(**SMALL)) is first
    for other in (dict(max_length=72), dict(per_device_train_batch_size=2), dict(lora=LoRAConfig(r=4)),
                  dict(gradient_checkpointing=not config.gradient_checkpointing), dict(bf16=True, fp16=False)):
        assert count_run(config.replace(**other), machine, shape)!=first, other
    assert count_run(config, machine, Qwen2Config(**SMALL | dict(vocab_size=520)))!=first
    assert count_run(config, machine, shape, learned=3)!=first!=count_run(config, T4, shape)

def test_two_counts_at_once_and_a_run_beside_them(monkeypatch):
    "The form counts in threads of its own; what stands in for autocast there is not seen by a run that trains"
    from concurrent.futures import ThreadPoolExecutor
    from sage_finetune.base.attention import autocast_dtype
    from sage_finetune.model import adapter, lora_path
    monkeypatch.setattr('sage_finetune.model.step_bytes._counts', type('Nothing', (dict,), dict(
        __contains__=lambda *_: False))()) # each is counted anew
    configs = [TrainingConfig(model_name=two_layers, max_length=64, per_device_train_batch_size=n) for n in (1, 2)]
    count = lambda c: estimate_memory(fit_config(c, T4)[0], T4).peak
    alone = [count(c) for c in configs]
    with ThreadPoolExecutor(3) as pool:
        counts = [pool.submit(count, c) for c in configs*2]
        while not all(c.done() for c in counts):
            assert [m.autocast_dtype('cpu') for m in (adapter, lora_path)]==[autocast_dtype('cpu')]*2
            assert torch.get_default_dtype()==torch.float32
            time.sleep(.002)
    assert [c.result() for c in counts]==pytest.approx(alone*2, rel=1e-6)
    assert torch.get_default_dtype()==torch.float32

def test_every_preset_keeps_its_promise_and_the_table_says_so():
    "What the notebook of presets prints is what is counted"
    cells = json.loads((Path(__file__).parents[2]/'nbs'/'00_config.ipynb').read_text(encoding='utf-8'))['cells']
    table = re.findall(r'^\| `(\w+)` \|.*\| ([\d.]+) GB \| (\d+) GB \|$',
                       '\n'.join(''.join(c['source']) for c in cells), re.M)
    assert {n for n,*_ in table}==set(PresetConfigs.fits_in)
    for name,counted,promised in table:
        # on a card that has what is promised, and no more
        card = Machine('cuda', memory=int(promised)*10**9, bf16=name!='colab_t4')
        e = estimate_memory(getattr(PresetConfigs, name)(), Machine() if name=='cpu' else card, CODER)
        assert float(promised)==PresetConfigs.fits_in[name] and e.fits(int(promised)*10**9)
        assert e.peak/1e9==pytest.approx(float(counted), rel=0.02, abs=0.1), name

def test_remedies_save_what_they_say():
    small,card = Qwen2Config(**SMALL),Machine('cuda', memory=700*10**6, bf16=True)
    e = estimate_memory(TrainingConfig(max_length=1024, per_device_train_batch_size=6,
                                       gradient_accumulation_steps=2, gradient_checkpointing=False, **DENSE), card,
                        small)
    assert not e.fits() and e.remedies
    for r in e.remedies:
        other = estimate_memory(e.config.replace(**r.changes), card, small)
        assert (e.peak-other.peak, other.fits())==(r.saves, r.enough) and other.config.effective_batch_size==12
    assert [r.saves for r in e.remedies]==sorted((r.saves for r in e.remedies), reverse=True)

def test_three_forms_say_the_same():
    from rich.console import Console
    for card in (10**10, 6*10**8): # it fits, and it does not
        config = TrainingConfig(model_name='a/<b>', max_length=1024, per_device_train_batch_size=4,
                                gradient_checkpointing=False, **DENSE)
        e = estimate_memory(config, Machine('cuda', memory=card, bf16=True), Qwen2Config(**SMALL))
        out = StringIO()
        Console(file=out, width=200).print(e)
        amounts = re.findall(r'[\d.]+ [GM]iB', str(e).partition('\n')[2])
        assert len(amounts)>=9 and re.findall(r'[\d.]+ [GM]iB', out.getvalue())==amounts
        assert re.findall(r'[\d.]+ [GM]iB', e._repr_html_())==amounts and '<b>a/<b>' not in e._repr_html_()
        assert repr(e)==str(e)

def test_unknown_memory_fits():
    e = estimate_memory(TrainingConfig(model_name='sage-tiny'), Machine('cuda'))
    assert e.card is None and e.fits() and not e.fits(1000)

def test_what_cannot_be_had_or_counted_is_one_line():
    with pytest.raises(SageError, match='neither a folder here nor in the cache'):
        estimate_memory(TrainingConfig(model_name='nobody/nothing'))
    with pytest.raises(ValueError, match='`model_config` must be a transformers config'):
        estimate_memory(TrainingConfig(), T4, dict(hidden_size=8))
    from transformers import CLIPConfig
    with pytest.raises((SageError, ValueError)) as caught: estimate_memory(TrainingConfig(), T4, CLIPConfig())
    assert '\n' not in str(caught.value)

def test_a_config_is_not_written_into():
    config = Qwen2Config(**SMALL)
    before = config.to_dict()
    estimate_memory(TrainingConfig(max_length=64), T4, config)
    assert config.to_dict()==before

def test_live_bytes_of_views_and_copies():
    with live_bytes() as live: x = torch.zeros(1000, device='meta', dtype=torch.float16)
    assert live.now==2000 and len(x)==1000
    with live_bytes() as live:
        x = torch.zeros(10, 100)
        y = x.t()
        z = y.contiguous()
        del x
        assert live.now==8000 # `y` still looks at the first
        del y
        assert (live.now, live.peak)==(4000, 8000)
        del z
    assert live.now==0

def tiny_model(**settings):
    from sage_finetune.model.adapter import add_lora
    from sage_finetune.base.loading import load_model
    return add_lora(load_model(two_layers), LoRAConfig(**settings))

def batch_of(rows, tokens): return dict(input_ids=torch.full((rows, tokens), 7), labels=torch.full((rows, tokens), 7))

@pytest.mark.parametrize('shape,settings', chequered([(1, 64), (3, 128), (8, 32)], [
    dict(), dict(target_modules='all-linear', r=32), dict(lora_dropout=0.0), dict(use_dora=True)]))
def test_counted_is_what_a_real_pass_takes(shape, settings):
    config = TrainingConfig(model_name=two_layers, fp16=False, load_in_8bit=False, optim='adamw_torch',
                            gradient_checkpointing=False, lora=LoRAConfig(**settings))
    probe = probe_step(tiny_model(**settings), batch_of(*shape), config, Machine())
    assert abs(probe.error)<0.02, str(probe)

@pytest.mark.parametrize('settings', [dict(), dict(target_modules='all-linear', r=32), dict(lora_dropout=0.0)])
def test_adapters_computed_together_are_counted(settings):
    config = TrainingConfig(model_name=two_layers, fp16=False, load_in_8bit=False, optim='adamw_torch',
                            gradient_checkpointing=False, lora=LoRAConfig(**settings))
    model,rows = tiny_model(**settings),batch_of(3, 128)
    peft = probe_step(model, rows, config, Machine())
    with evaluating(model, training=True): path = prove_lora_path(model)
    with lora_path(path.groups): together = probe_step(model, rows, config, Machine())
    assert abs(together.error)<0.02, str(together)
    assert together.measured<peft.measured # and the step takes less

def test_packed_rows_are_counted():
    config = TrainingConfig(model_name=two_layers, fp16=False, load_in_8bit=False, gradient_checkpointing=False)
    batch = batch_of(2, 128) | dict(position_ids=torch.arange(64).repeat(2, 2))
    probe = probe_step(tiny_model(), batch, config, Machine())
    assert abs(probe.error)<0.1, str(probe)

def test_the_probe_changes_nothing():
    model,config = tiny_model(),TrainingConfig(model_name=two_layers, fp16=False, load_in_8bit=False)
    kept = {n: p.detach().clone() for n,p in model.named_parameters()}
    grads = [p for p in model.parameters() if p.requires_grad]
    for p in grads: p.grad = torch.ones_like(p)
    model.eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    probe_step(model, batch_of(1, 16), config, Machine())
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(p, kept[n]) for n,p in model.named_parameters())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in grads)

def test_the_longest_rows_are_probed():
    from sage_finetune.training.batches import Collator
    rows = [dict(input_ids=[1]*n, labels=[1]*n) for n in (5, 40, 8, 33)]
    assert longest_batch(rows, 2, Collator(0))['input_ids'].shape==(2, 40)

@pytest.mark.parametrize('name', ['adamw_torch', 'adamw_torch_fused', 'lion_32bit', 'sgd', 'paged_adamw_8bit',
                                  'adamw_8bit', 'paged_lion_8bit'])
def test_optimizer_state_grows_with_what_is_trained(name):
    one,paged = optimizer_bytes(name, [5000])
    two,_ = optimizer_bytes(name, [5000, 5000])
    assert 0<=paged<=one<=two<=2*one and optimizer_bytes(name, [])==(0, 0)
    assert optimizer_bytes(name, [200_000])[1]==(optimizer_bytes(name, [200_000])[0]
                                                 - 1024*(1 if 'lion' in name else 2) if 'paged' in name else 0)

def test_kernels():
    half = torch.bfloat16
    assert (attention_kernel(H200, half, True, False, 256)=='flash'
            and attention_kernel(H200, half, True, False, 512)=='efficient')
    # grouped heads are repeated where no fused kernel shares them: by `repeat_heads`, with a mask by transformers
    assert attention_kernel(H200, half, True, True)==attention_kernel(H200, half, False, True)=='efficient'
    assert attention_kernel(T4, torch.float16, True, False)=='efficient'
    assert attention_kernel(H200, torch.float32, True, False)=='efficient'
    assert attention_kernel(Machine('mps'), half, False, False)=='math'
    assert [packed_bytes(64, 64, b) for b in (4, 8)]==[2048+64+4+1092, 4096+256]
