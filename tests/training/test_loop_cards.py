"Training on cards, played by a CPU: a Tesla T4 with its loss scaler, and what went wrong there"
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from cards import T4, t4_twin
from quick import few, two_layers
from sage_finetune import LoRATrainer, TrainingConfig
from sage_finetune.core.machine import Change, Machine
from sage_finetune.rows.formats import sample_rows
from sage_finetune.training.callbacks import NotFinite, read_metrics
from sage_finetune.training.loop import out_of_memory
from sage_finetune.training.resume import remembered_fit

def config(folder, **more):
    rows = folder/'rows.jsonl'
    if not rows.exists(): rows.write_text(''.join(json.dumps(r)+'\n' for r in sample_rows('qa', 24)))
    return TrainingConfig(**dict(
        model_name=two_layers, data_path=rows, output_dir=folder/'run', max_length=64, learning_rate=5e-3, max_steps=6,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, logging_steps=1, test_size=0.0,
        report_to='none', lora=dict(r=4, lora_dropout=0.0)) | more)

one_row = dict(per_device_train_batch_size=1) # a CPU is slow in fp16

def trained_on_a_t4(c, spoil=None, kind=LoRATrainer):
    "(the run, its result, the scaler) after training on a T4; `spoil` changes a gradient, by the optimizer step"
    said = []
    with t4_twin() as scalers:
        run = kind(c, quiet=True)
        run.say = lambda what: said.append(str(what))
        run.load_model_and_tokenizer()
        run.apply_lora()
        if spoil:
            p = next(p for n,p in run.model.named_parameters() if p.requires_grad and 'lora_A' in n)
            p.register_hook(lambda g: spoil(g, run.trainer.state.global_step if run.trainer else 0))
        run.said = said
        result = run.train()
    return run,result,scalers[-1]

def numbers(run): return {n: p.detach().clone() for n,p in run.model.named_parameters() if p.requires_grad}

@pytest.mark.parametrize('more', few([
    dict(), dict(optim='paged_adamw_8bit', load_in_4bit=True), dict(load_in_8bit=True),
    dict(packing=True, max_grad_norm=0.0)]),
    ids=lambda m: ' '.join(m) or 'default')
def test_a_t4_learns(tmp_path, more):
    run,result,scaler = trained_on_a_t4(config(tmp_path, **more))
    assert (run.fitted.fp16, run.fitted.bf16)==(True, False)
    assert result.skipped<=2 and scaler.get_scale()>=2**14 # the first scale may be too high by a little
    assert run.model.config._attn_implementation=='repeated_heads' or more.get('packing')
    assert {p.dtype for p in run.model.parameters() if p.requires_grad}=={torch.float32}
    losses = [m['loss'] for m in read_metrics(run.folder.metrics) if 'loss' in m]
    assert len(losses)==6 and losses[-1]<losses[0]*.97

def test_a_t4_is_near_to_a_cpu(tmp_path):
    "The same rows in fp16 and in fp32: the losses agree within what 11 bits resolve"
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    run,_,_ = trained_on_a_t4(config(tmp_path/'a'))
    cpu = LoRATrainer(config(tmp_path/'b'), quiet=True, machine=Machine())
    cpu.train()
    one,two = ([m['loss'] for m in read_metrics(r.folder.metrics) if 'loss' in m] for r in (run, cpu))
    assert one[0]==pytest.approx(two[0], rel=2e-3) and one[0]!=two[0] # before a step may have been skipped

@pytest.mark.parametrize('value', few([math.nan, math.inf]))
@pytest.mark.parametrize('optim', few(['adamw_torch_fused', 'adamw_torch', 'paged_adamw_8bit']))
def test_a_gradient_that_is_never_finite_ends_the_run(tmp_path, value, optim):
    "G7: also where a fused optimizer skips by itself, which accelerate does not see"
    with pytest.raises(NotFinite, match='last 10 optimizer steps up to step 10 were skipped') as ended:
        trained_on_a_t4(config(tmp_path, max_steps=30, optim=optim, **one_row), lambda g,step: g*value)
    assert 'compute in bf16 or fp32' in str(ended.value)
    assert not (tmp_path/'run'/'results.json').exists()

def test_a_short_run_that_took_no_step_is_not_trained(tmp_path):
    with pytest.raises(NotFinite, match='the last 3 optimizer steps'):
        trained_on_a_t4(config(tmp_path, max_steps=3, **one_row), lambda g,step: g*math.nan)

@pytest.mark.parametrize('optim', few(['adamw_torch_fused', 'adamw_torch']))
def test_a_few_skipped_steps_are_counted_and_told(tmp_path, optim):
    c = config(tmp_path, max_steps=8, optim=optim, **one_row)
    run,result,scaler = trained_on_a_t4(c, lambda g,step: g*(math.nan if step in (2, 5) else 1))
    skipped = [m['step'] for m in read_metrics(run.folder.metrics) if m.get('skipped_steps')]
    assert {3, 6}<={*skipped} and len(skipped)<=4 and scaler.get_scale()==2**(16-len(skipped))
    assert result.skipped==len(skipped) and 'skipped steps' in str(result)
    for line in run.folder.metrics.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f'{word} is no JSON')) # strict readers
    state = next(run.folder.checkpoints.glob('checkpoint-*/trainer_state.json'))
    assert 'NaN' not in state.read_text()
    assert any(t.abs().max()>0 for n,t in numbers(run).items() if 'lora_B' in n) if run.model else True

def test_a_run_that_resumes_counts_on(tmp_path):
    class Stops(LoRATrainer):
        def callbacks(self):
            class Stop(TrainerCallback):
                def on_step_end(callback, args, state, control, **kwargs):
                    if state.global_step==4 and not Stops.done: self.stop()
            return [*super().callbacks(), Stop()]
    Stops.done,c = False,config(tmp_path, max_steps=6, **one_row)
    spoil = lambda g,step: g*(math.nan if step==1 else 1)
    with pytest.raises(KeyboardInterrupt): trained_on_a_t4(c, spoil, Stops)
    Stops.done = True
    _,result,_ = trained_on_a_t4(c, None, Stops)
    assert result.steps==6 and 1<=result.skipped<=2

# G17: the words of a full card

@pytest.mark.parametrize('words', [
    'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`',
    'cuDNN error: CUDNN_STATUS_ALLOC_FAILED', 'cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you '
    'passed in a non-contiguous input.', 'CUDA out of memory. Tried to allocate 2.00 GiB', 'HIP out of memory.',
    'HIP error: hipErrorOutOfMemory', 'HIPBLAS_STATUS_ALLOC_FAILED', 'CUDA driver error: out of memory',
    'cudaErrorMemoryAllocation: out of memory', 'CUSPARSE_STATUS_ALLOC_FAILED', 'CUSOLVER_STATUS_ALLOC_FAILED',
    'cuFFT error: CUFFT_ALLOC_FAILED', "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    'MPS backend out of memory (MPS allocated: 9 GB, max allowed: 9 GB)', 'not enough memory: you tried to allocate 9'])
def test_words_of_a_full_card(words): assert out_of_memory(RuntimeError(words))

@pytest.mark.parametrize('error', [
    RuntimeError('CUDA error: device-side assert triggered'), RuntimeError('CUBLAS_STATUS_EXECUTION_FAILED'),
    RuntimeError('cuDNN error: CUDNN_STATUS_EXECUTION_FAILED'), ValueError('out of memory'),
    RuntimeError('Expected all tensors to be on the same device')])
def test_other_words(error): assert not out_of_memory(error)

@pytest.mark.slow
def test_cublas_without_memory_halves_the_batch(tmp_path):
    class Full(LoRATrainer):
        def callbacks(self):
            class Fail(TrainerCallback):
                def on_step_begin(callback, args, state, control, **kwargs):
                    if state.global_step==2 and args.per_device_train_batch_size==4:
                        raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`')
            return [*super().callbacks(), Fail()]
    run,result,_ = trained_on_a_t4(config(tmp_path), kind=Full)
    assert result.steps==6 and run.fitted.per_device_train_batch_size==2 and run.fitted.effective_batch_size==4

# The fit of a run that was begun

def test_what_was_decided_by_free_memory_is_kept(tmp_path):
    "Another program takes the memory of the card between two starts: the run goes on as it began"
    c,half_full = config(tmp_path),Machine('cuda', 'Tesla T4', memory=T4.memory, free=10**9, cores=8, ram=32*10**9)
    run,_,_ = trained_on_a_t4(c)
    assert not run.fitted.load_in_8bit
    again = LoRATrainer(c, quiet=True, machine=half_full)
    assert again.fitted==run.fitted and not any(x.by_hand for x in again.changes)
    other = LoRATrainer(c.replace(load_in_8bit=True), quiet=True, machine=half_full)
    assert other.fitted.load_in_8bit # by hand
    assert remembered_fit(run.folder, c, Machine()) is None # another machine
    with pytest.raises(TypeError): Change(setting='x')

@pytest.mark.slow
def test_another_fit_is_told(tmp_path):
    c = config(tmp_path, max_steps=4)
    run,_,_ = trained_on_a_t4(c)
    said = []
    there = LoRATrainer(c, quiet=True, machine=Machine())
    there.say = lambda what: said.append(str(what))
    there.train()
    assert 'fp16 True → False' in [s for s in said if 'otherwise than before' in s][0]

def test_a_cpu_opens_without_settings_that_nobody_asked_for(tmp_path):
    said = []
    run = LoRATrainer(config(tmp_path), machine=Machine(cores=2))
    run.say = lambda what: said.append(str(what))
    run.load_model_and_tokenizer()
    opening = said[0]
    assert not any(n in opening for n in ('fp16', 'load_in_8bit', 'paged', 'checkpointing'))
    assert '4 defaults are others' in opening and len(run.changes)==4
    assert len([line for line in opening.splitlines() if line])==2
    wished = LoRATrainer(config(tmp_path, fp16=True), machine=Machine(cores=2))
    wished.say = lambda what: said.append(str(what))
    wished.load_model_and_tokenizer()
    assert 'fp16 training needs a CUDA GPU' in said[-2] and 'paged' not in said[-2]
