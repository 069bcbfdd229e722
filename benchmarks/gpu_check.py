"""What cannot be seen without a card, seen on one: python benchmarks/gpu_check.py [--only NAME …] [--minutes 8]

Each check prints one JSON line as soon as it is done: name, whether it holds, seconds, figures. No network is used. The
model is the embedded one, and for memory and speed a Qwen2 of 1.5B parameters with random weights, made from its shape.
On a CPU (or with `--tiny`) everything is small, so that it is known to run; figures of a CPU say nothing of a card.
"""
import argparse
import json
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoConfig, Qwen2Config

from sage_finetune import LoRAConfig, LoRATrainer, PresetConfigs, TrainingConfig
from sage_finetune.config import precision_of, resolve_model
from sage_finetune.core.machine import Machine
from sage_finetune.model.adapter import add_lora, ready_for_quantised_training
from sage_finetune.base.loading import load_model, model_class, quantisation_of
from sage_finetune.model.loss import FrozenHead, LogitTransform, loss_sum
from sage_finetune.model.memory import probe_step
from sage_finetune.rows.formats import sample_rows
from sage_finetune.training.batches import Collator
from sage_finetune.training.callbacks import NotFinite, read_metrics
from sage_finetune.training.loop import CausalLMTrainer
from sage_finetune.training.packing import prove_packing

DEVICE = Machine.here().device
HALF = dict(bf16=torch.bfloat16, fp16=torch.float16)

def autocast(dtype): return torch.autocast(DEVICE, dtype) if dtype in HALF.values() else nullcontext()

def adapted(name, dtype, device, **bits):
    "A model with an adapter whose B is not zero, so that every number has a gradient"
    config = TrainingConfig(bf16=dtype==torch.bfloat16, fp16=dtype==torch.float16,
                            **dict(dict(load_in_8bit=False), **bits))
    model = ready_for_quantised_training(load_model(name, dtype, device, quantisation_of(config)))
    model = add_lora(model, LoRAConfig(lora_dropout=0.0, target_modules='all-linear')).train()
    generator = torch.Generator().manual_seed(0)
    for n,p in model.named_parameters():
        if 'lora_' in n: p.data.copy_(torch.randn(p.shape, generator=generator)*.02)
    return model

def passed(model, dtype, ids, scale=1):
    "Loss, and the gradient of all adapter numbers in one vector, in 32 bits on the CPU"
    ids = ids.to(model.device)
    with torch.autocast(model.device.type, dtype) if dtype in HALF.values() else nullcontext():
        total,n = loss_sum(model, ids, ids)
    (total/n*scale).backward()
    grads = [p.grad.float().cpu().flatten()/scale for p in model.parameters() if p.requires_grad]
    return (total/n).item(),torch.cat(grads)

def exact(tiny):
    "Loss and gradient against 32 bits on the CPU; 8 and 4 bits against the same rounding there"
    ids = torch.randint(5, 4000, (2, 32 if tiny else 256), generator=torch.Generator().manual_seed(1))
    limits = dict(fp32=(1e-5, 1e-4), bf16=(2e-2, 8e-2), fp16=(4e-3, 2e-2))
    found,holds = {},True
    true_loss,true = passed(adapted('sage-tiny', torch.float32, 'cpu'), torch.float32, ids)
    for name,(of_loss,of_gradient) in limits.items():
        dtype = HALF.get(name, torch.float32)
        loss,g = passed(adapted('sage-tiny', dtype, DEVICE), dtype, ids, 2**12 if name=='fp16' else 1)
        found[name] = dict(loss=abs(loss-true_loss)/true_loss, gradient=((g-true).norm()/true.norm()).item())
        holds &= found[name]['loss']<=of_loss and found[name]['gradient']<=of_gradient
    for name,bits in dict(eight=dict(load_in_8bit=True), four=dict(load_in_4bit=True)).items():
        at,h = passed(adapted('sage-tiny', torch.float32, 'cpu', **bits), torch.float32, ids)
        loss,g = passed(adapted('sage-tiny', torch.bfloat16, DEVICE, **bits), torch.bfloat16, ids)
        found[name] = dict(loss=abs(loss-at)/at, cosine=torch.cosine_similarity(g, h, dim=0).item())
        holds &= found[name]['loss']<=2e-2 and found[name]['cosine']>=(.98 if tiny else .995)
    return holds,found

def head(tiny):
    "The loss in slices against that of whole logits, and its speed by the size of a slice"
    from sage_finetune.model import loss
    N,H,V = (32, 64, 1000) if tiny else (4096, 1536, 151_936)
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight,to = torch.randn(V, H, device=DEVICE, dtype=torch.bfloat16)*.02,torch.randint(V, (N,), device=DEVICE)
    def ours():
        total = FrozenHead.apply(hidden, to, weight, None, LogitTransform(), True)
        return total,torch.autograd.grad(total, hidden)[0].float()
    whole = torch.nn.functional.cross_entropy((hidden@weight.t()).float(), to, reduction='sum')
    true,(total,g) = torch.autograd.grad(whole, hidden)[0].float(),ours()
    found = dict(loss=abs(total.item()-whole.item())/whole.item(), gradient=((g-true).norm()/true.norm()).item())
    own,found['ms'] = loss.head_bytes.get(DEVICE),{}
    for power in (20,) if tiny else range(26, 32):
        loss.head_bytes[DEVICE] = 2**power
        ours()
        began = time.perf_counter()
        for _ in range(3): ours()
        if DEVICE=='cuda': torch.cuda.synchronize()
        found['ms'][f'2^{power}'] = round((time.perf_counter()-began)/3*1e3, 2)
    loss.head_bytes[DEVICE] = own
    return found['loss']<=2e-3 and found['gradient']<=2e-2,found

def packing(tiny):
    "A packed row is its documents alone, and the kernel is used with 16, 8 and 4 bits"
    generator = torch.Generator().manual_seed(2)
    docs = [torch.randint(5, 4000, (1, n), generator=generator) for n in ((9, 15, 8) if tiny else (200, 57, 255))]
    row = torch.cat(docs, 1)
    labels = torch.cat([torch.cat([torch.full_like(d[:, :1], -100), d[:, 1:]], 1) for d in docs], 1)
    positions = torch.cat([torch.arange(d.shape[1])[None] for d in docs], 1)
    found,holds = {},True
    for name,bits in dict(sixteen={}, eight=dict(load_in_8bit=True), four=dict(load_in_4bit=True)).items():
        model = adapted('sage-tiny', torch.bfloat16, DEVICE, **bits)
        why = prove_packing(model, 1, torch.bfloat16)
        kind = model.get_base_model().config._attn_implementation
        with torch.no_grad(), autocast(torch.bfloat16):
            alone = sum(loss_sum(model, d.to(DEVICE), d.to(DEVICE))[0].item() for d in docs)
            packed = loss_sum(model, *(t.to(DEVICE) for t in (row, labels, positions)))[0].item()
        found[name] = dict(kept_apart_by=kind, why=why, off=abs(packed-alone)/alone)
        holds &= kind=='documents' and found[name]['off']<=1e-2
    return holds,found

def large(folder, tiny):
    "A model of the default's shape with random weights, in a folder"
    place = Path(folder)/'large'
    if place.is_dir(): return str(place)
    shape = dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                 intermediate_size=8960, vocab_size=151_936)
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=96, vocab_size=4096)
    with torch.device('cpu' if tiny else DEVICE):
        config = Qwen2Config(**(small if tiny else shape), tie_word_embeddings=True)
        model = model_class(AutoConfig.from_pretrained(resolve_model('sage-tiny'))).from_config(
            config, dtype=torch.bfloat16)
    model.save_pretrained(place)
    for file in Path(resolve_model('sage-tiny')).glob('*token*'): (place/file.name).write_bytes(file.read_bytes())
    template = Path(resolve_model('sage-tiny'))/'chat_template.jinja'
    if template.is_file(): (place/template.name).write_bytes(template.read_bytes())
    return str(place)

def memory(tiny):
    "The probe's prediction against what the allocator counts"
    found,tokens = {},64 if tiny else 1024
    ways = dict(bf16=dict(), checkpointing=dict(gradient_checkpointing=True), fp16=dict(fp16=True),
                eight=dict(load_in_8bit=True), four=dict(load_in_4bit=True))
    row = dict(input_ids=[7]*tokens, labels=[7]*tokens)
    with tempfile.TemporaryDirectory() as folder:
        for name,how in ways.items():
            c = TrainingConfig(**dict(dict(model_name=large(folder, tiny), load_in_8bit=False, max_length=tokens,
                                           gradient_checkpointing=False, optim='adamw_torch'),
                                      **({} if 'fp16' in how else dict(bf16=True)), **how))
            dtype = torch.float16 if c.fp16 else torch.bfloat16
            model = load_model(c.model_name, dtype, DEVICE, quantisation_of(c))
            model = add_lora(ready_for_quantised_training(model), c.lora).train()
            if c.gradient_checkpointing: model.gradient_checkpointing_enable(dict(use_reentrant=False))
            p = probe_step(model, Collator(0)([row]*(1 if tiny else 2)), c)
            found[name] = dict(measured=p.measured, predicted=p.predicted, error=p.error)
            del model
            if DEVICE=='cuda': torch.cuda.empty_cache()
    errors = [abs(f['error']) for f in found.values() if f['error'] is not None]
    return bool(errors) and (tiny or max(errors)<=.1),found

def _run(folder, tiny, **more):
    rows = Path(folder)/'rows.jsonl'
    if not rows.exists(): rows.write_text(''.join(json.dumps(r)+'\n' for r in sample_rows('qa', 64)))
    c = TrainingConfig(**dict(
        model_name='sage-tiny', data_path=rows, output_dir=Path(folder)/'run', max_length=64, max_steps=10,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=5e-3, logging_steps=1,
        test_size=0.0, report_to='none', lora=dict(r=4)) | more)
    return LoRATrainer(c, quiet=True)

def _long_rows(folder, n=40):
    "Rows that are longer than any preset takes, so that every row is full"
    path = Path(folder)/'long.jsonl'
    answer = 'The lamp turns once in ten seconds. '*1200
    path.write_text(''.join(json.dumps(dict(question=f'Lamp {i}?', answer=answer))+'\n' for i in range(n)))
    return path

@contextmanager
def _capped(size):
    "While the block runs, this process has no more of the card than `size` bytes; without a card, nothing"
    if DEVICE!='cuda' or not size: return (yield)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size/torch.cuda.get_device_properties(0).total_memory))
    try: yield
    finally: torch.cuda.set_per_process_memory_fraction(1.0)

def presets(tiny):
    "Each preset trains a step of full rows in the memory that it is for, and nothing is made smaller on the way"
    found,small = {},dict(max_length=48, gradient_accumulation_steps=2) if tiny else {}
    with tempfile.TemporaryDirectory() as folder:
        rows,model = _long_rows(folder),large(folder, tiny)
        for name in ('minimal', 'rtx_3060', 'colab_t4', 'rtx_4090', 'a100'):
            gb = PresetConfigs.fits_in[name]
            c = getattr(PresetConfigs, name)(
                model_name=model, data_path=rows, output_dir=Path(folder)/name, max_steps=1, test_size=0.0,
                overflow='truncate', cut_answers=True, report_to='none', **small)
            with _capped((gb-.6)*1e9):
                run = LoRATrainer(c, quiet=True)
                result = run.train()
            found[name] = dict(gb=gb, steps=result.steps, precision=precision_of(run.fitted),
                               made_smaller=[x.setting for x in run.while_running])
            del run
    return all(f['steps']==1 and not f['made_smaller'] for f in found.values()),found

def _peak(): return torch.cuda.max_memory_allocated() if DEVICE=='cuda' else 0

def _no_more_than(rows):
    "Without a card: a micro-batch of more rows than this runs out of memory"
    compute = CausalLMTrainer.compute_loss
    def full(self, model, inputs, *args, **kwargs):
        if len(inputs['input_ids'])>rows: raise torch.OutOfMemoryError('simulated')
        return compute(self, model, inputs, *args, **kwargs)
    return patch.object(CausalLMTrainer, 'compute_loss', full)

def out_of_memory(tiny):
    "Where 16 rows do not fit and 8 do, the run halves them, and ends as one that had 8 from the start"
    peaks,losses = {},{}
    with tempfile.TemporaryDirectory() as folder:
        rows,model = _long_rows(folder),large(folder, tiny)
        def trained(name, batch, gather, cap=0):
            if DEVICE=='cuda': torch.cuda.reset_peak_memory_stats()
            with _capped(cap):
                run = _run(folder, tiny, model_name=model, data_path=rows, output_dir=Path(folder)/name, max_steps=3,
                           per_device_train_batch_size=batch, gradient_accumulation_steps=gather,
                           load_in_8bit=False, overflow='truncate', cut_answers=True,
                           max_length=48 if tiny else 512, learning_rate=1e-4, gradient_checkpointing=False)
                losses[name] = run.train().train_loss
            peaks[name] = _peak()
            return run
        trained('eight', 8, 2)
        if DEVICE=='cuda': trained('sixteen', 16, 1)
        with _no_more_than(8) if DEVICE!='cuda' else nullcontext():
            run = trained('capped', 16, 1, (peaks['eight']+peaks.get('sixteen', 0))/2)
        used = run.fitted.per_device_train_batch_size
        del run
        if DEVICE=='cuda': torch.cuda.empty_cache()
    off = abs(losses['capped']-losses['eight'])/losses['eight']
    return used<=8 and off<=1e-2,dict(used=used, off=off, peaks=peaks)

def scaler(tiny):
    "Under fp16 a gradient that is never finite ends the run; without a scaler (on a CPU) too"
    with tempfile.TemporaryDirectory() as folder:
        run = _run(folder, tiny, max_steps=20, **(dict(fp16=True) if DEVICE=='cuda' else {}))
        run.load_model_and_tokenizer()
        run.apply_lora()
        p = next(p for n,p in run.model.named_parameters() if p.requires_grad and 'lora_A' in n)
        p.register_hook(lambda g: g*float('nan'))
        try: run.train()
        except NotFinite as e: return True,dict(said=str(e))
    return False,dict(said='the run ended as trained')

def resume(tiny):
    "Stopped after 5 of 10 steps and resumed, against a run that was never stopped"
    from transformers import TrainerCallback
    class Stops(LoRATrainer):
        def callbacks(self):
            class Stop(TrainerCallback):
                def on_step_end(callback, args, state, control, **kwargs):
                    if state.global_step==5: self.stop()
            return [*super().callbacks(), Stop()]
    def weights(run):
        from safetensors.torch import load_file
        return load_file(run.folder.lora_weights/'adapter_model.safetensors')
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        whole = _run(a, tiny)
        whole.train()
        first = Stops(_run(b, tiny).config, quiet=True)
        try: first.train()
        except KeyboardInterrupt: pass
        second = _run(b, tiny)
        second.train()
        x,y = weights(whole),weights(second)
    off = max((x[k]-y[k]).abs().max().item() for k in x)
    return off==0 if DEVICE=='cpu' else off<=1e-3,dict(difference=off)

def _bare(tiny):
    "Tokens a second of a loop with nothing around it: full rows of random tokens, the same model and adapter"
    with tempfile.TemporaryDirectory() as folder:
        model = adapted(large(folder, tiny), torch.bfloat16, DEVICE)
        ids = torch.randint(5, 4000, (4, 32 if tiny else 1024), device=DEVICE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        for step in range(2 if tiny else 8):
            if step==1: began = time.perf_counter()
            with autocast(torch.bfloat16): loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if DEVICE=='cuda': torch.cuda.synchronize()
    return step*ids.numel()/(time.perf_counter()-began)

def speed(tiny):
    "Tokens a second of a run, by its settings, and of a bare loop; reported, not judged"
    found = dict(bare=dict(tokens_per_second=round(_bare(tiny), 1)))
    ways = dict(padded={}, packed=dict(packing=True), four_packed=dict(packing=True, load_in_4bit=True),
                eight_packed=dict(packing=True, load_in_8bit=True))
    for name,how in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            size = dict(max_steps=3) if tiny else dict(model_name=large(folder, tiny), max_length=1024, max_steps=12)
            run = _run(folder, tiny, **dict(dict(load_in_8bit=False, learning_rate=1e-5), **size, **how))
            run.train()
            lines = [m for m in read_metrics(run.folder.metrics) if 'tokens_per_second' in m][1:]
            keys = 'tokens_per_second', 'matmul_share', 'memory'
            found[name] = {k: lines[-1].get(k) for k in keys}
    return all(f['tokens_per_second'] for f in found.values()),found

CHECKS = dict(exact=exact, head=head, packing=packing, memory=memory, presets=presets, out_of_memory=out_of_memory,
              scaler=scaler, resume=resume, speed=speed)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', nargs='+', choices=CHECKS, default=[*CHECKS])
    parser.add_argument('--minutes', type=float, default=8)
    parser.add_argument('--tiny', action='store_true', help='small sizes; a CPU has no others')
    args = parser.parse_args(argv)
    warnings.simplefilter('ignore')
    tiny,end,wrong = args.tiny or DEVICE!='cuda',time.monotonic()+60*args.minutes,0
    where = dict(machine=str(Machine.here()), torch=torch.__version__, date=time.strftime('%Y-%m-%d'), tiny=tiny)
    print(json.dumps(where), flush=True)
    for name in args.only:
        if time.monotonic()>end:
            print(json.dumps(dict(check=name, skipped='no time left')), flush=True)
            continue
        began = time.monotonic()
        try: holds,figures = CHECKS[name](tiny)
        except Exception as e: holds,figures = False,dict(error=f'{type(e).__name__}: {" ".join(str(e).split())[:300]}')
        wrong += not holds
        seconds = round(time.monotonic()-began, 1)
        print(json.dumps(dict(check=name, holds=bool(holds), seconds=seconds, **figures)), flush=True)
    return int(bool(wrong))

if __name__=='__main__': sys.exit(main())
