"""Several processes that train as one, on a CPU over gloo: against one process, row by row, through kills and stops, and with the model divided among them.

The processes are forked from one that has imported everything, with the environment that a launcher gives them; the launcher itself is started where it is what is tested.
"""
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from sage_finetune.callbacks import read_metrics
from sage_finetune.config import LoRAConfig, SageError, TrainingConfig, read_json, write_json
from sage_finetune.folder import RunFolder, last_checkpoint
from sage_finetune.launch import launch_command
from sage_finetune.trainer import LoRATrainer, Stopped

pytestmark = pytest.mark.skipif(os.name!='posix', reason='needs signals and processes as POSIX has them')
forked = multiprocessing.get_context('forkserver') if os.name=='posix' else None
if forked: forked.set_forkserver_preload(['sage_finetune.trainer', 'sage_finetune.launch'])

fsdp2 = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP', FSDP_STATE_DICT_TYPE='FULL_STATE_DICT',
             FSDP_RESHARD_AFTER_FORWARD='true', FSDP_CPU_RAM_EFFICIENT_LOADING='true') # what accelerate makes of `launch.ways['fsdp2']`


# What is trained: 23 counted words, 21 of them to learn from, so that neither rows nor passes come out even

def config(folder, data, **more):
    settings = dict(model_name='sage-tiny', data_path=data, output_dir=folder, test_size=0.1, num_train_epochs=2, save_steps=3, per_device_train_batch_size=2,
                    gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1, report_to='none', lora=LoRAConfig(r=4, lora_dropout=0.0))
    return TrainingConfig(**(settings | more))


class Noted(LoRATrainer):
    "Notes each row that is trained on, and does something at the end of a step"
    def __init__(self, *args, at=None, do=None, **kwargs): super().__init__(*args, **kwargs); self.at,self.do,self.rows = at,do,[]

    def setup_trainer(self):
        super().setup_trainer()
        real = self.trainer.training_step
        def training_step(model, inputs, *args, **kwargs):
            self.rows += [tuple(i for i,l in zip(ids, range(len(ids)))) for ids in inputs['input_ids'].tolist()]
            return real(model, inputs, *args, **kwargs)
        self.trainer.training_step = training_step

    def callbacks(self):
        run = self
        class At(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step==run.at: run.do()
        return [*super().callbacks(), At()]


def adapter(folder):
    from safetensors.torch import load_file
    return load_file(RunFolder(folder).lora_weights/'adapter_model.safetensors')
def apart(one, two):
    a,b = adapter(one),adapter(two)
    assert a.keys()==b.keys()
    return max((a[k]-b[k]).abs().max().item() for k in a)
def losses(folder): return [(m['step'], k, m[k]) for m in read_metrics(RunFolder(folder).metrics) for k in ('loss', 'eval_loss') if k in m]
def near(one, two):
    "How far the adapters of two runs are apart; their losses must agree"
    assert [l[:2] for l in losses(one)]==[l[:2] for l in losses(two)]
    assert max(abs(a[2]-b[2]) for a,b in zip(losses(one), losses(two)))<=1e-5
    return apart(one, two)


# Processes

def _child(place, rank, work, args, more, env):
    os.environ.update(env)
    sys.stderr = sys.stdout = open(place/f'said_{rank}', 'w', buffering=1)
    torch.set_num_threads(1)
    try: work(*args, **more); code = 0
    except (KeyboardInterrupt, SageError, ValueError, OSError) as e:
        print(f'{type(e).__name__}: {e}'); code = 128+getattr(e, 'signal', 2) if isinstance(e, KeyboardInterrupt) else 1
    (place/f'seconds_{rank}').write_text(f'{time.process_time()}')
    sys.stderr.flush(); os._exit(code)

def together(place, work, *args, n=2, within=120, env={}, **more):
    "`work` in `n` processes that a launcher might have started; their exit statuses, and what they said"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    place.mkdir(parents=True, exist_ok=True)
    of = lambda r: dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1', **env)
    crew = [forked.Process(target=_child, args=(place, r, work, args, more, of(r))) for r in range(n)]
    for p in crew: p.start()
    end = time.monotonic()+within
    for p in crew: p.join(max(0, end-time.monotonic()))
    hung = [p.pid for p in crew if p.is_alive()]
    for p in crew: p.kill(); p.join()
    assert not hung, 'a process waits for ever'
    return [p.exitcode for p in crew],[(place/f'said_{r}').read_text() for r in range(n)]

def rank(): return int(os.environ['RANK'])

def train(folder, data, note=None, at=None, who=None, do=None, **more):
    "Train; `do` is called at the end of step `at`, in process `who`"
    run = Noted(config(folder, data, **more), quiet=True, at=at if who in (None, rank()) else None, do=do)
    written = []
    watch = [True]
    def opened(event, args):
        if watch and event=='open' and isinstance(args[0], (str, bytes)) and isinstance(args[1], str) and set(args[1])&set('wax+') and os.fsdecode(args[0]).startswith(str(folder)):
            written.append(os.path.relpath(os.fsdecode(args[0]), folder))
    sys.addaudithook(opened)
    run.train(); watch.clear()
    if note: write_json(f'{note}_{rank()}', dict(rows=run.rows, every=[list(r['input_ids']) for r in run.trainer.train_dataset], written=written, pad=run.trainer.data_collator.pad_id))

def die(): os.kill(os.getpid(), signal.SIGKILL)
def term(): os.kill(os.getpid(), signal.SIGTERM)
def no_memory(): raise torch.OutOfMemoryError('simulated')


@pytest.fixture(scope='module')
def base(tmp_path_factory): return tmp_path_factory.mktemp('distributed')
@pytest.fixture(scope='module')
def data(base):
    rows = [dict(question=f'{i} words?', answer=' '.join(['word']*(1+i*7%12))+'.') for i in range(23)]
    (base/'words.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    return base/'words.jsonl'

def alone(folder, data, **more):
    "One process with as many passes as two have together"
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    LoRATrainer(config(folder, data, **(dict(gradient_accumulation_steps=4) | more)), quiet=True).train()
    torch.set_num_threads(threads)
    return folder

@pytest.fixture(scope='module')
def one(base, data): return alone(base/'one', data)
@pytest.fixture(scope='module')
def two(base, data):
    codes,said = together(base/'crew_two', train, base/'two', data, note=base/'two_note')
    assert codes==[0, 0], said
    return base/'two'


# As one

def seen_once(note, epochs):
    "Every row once in each pass over the data, in one process or the other; how many passes without rows there were"
    notes = [read_json(f'{note}_{r}') for r in range(2)]
    pad,every = notes[0]['pad'],notes[0]['every']
    bare = lambda row: tuple(t for t in row if t!=pad)
    rows = [bare(r) for n in notes for r in n['rows']]
    assert Counter(r for r in rows if r)==Counter(bare(r) for r in every for _ in range(epochs))
    assert not {bare(r) for r in notes[0]['rows'] if bare(r)} & {bare(r) for r in notes[1]['rows'] if bare(r)} or epochs>1
    return rows.count(())

def test_two_processes_are_one(one, two, base):
    assert near(one, two)<=1e-5
    assert seen_once(base/'two_note', 2)==2 # 21 rows, 2 in a pass: 11 passes for two, so one comes away empty-handed each time
    assert read_json(RunFolder(two).config)['_processes']==2
    assert read_json(RunFolder(two).results)['loss_after']==pytest.approx(read_json(RunFolder(one).results)['loss_after'], abs=1e-5)

def test_only_the_first_writes(two, base):
    written = [read_json(base/f'two_note_{r}')['written'] for r in range(2)]
    assert 'metrics.jsonl' in written[0]
    assert {Path(w).name for w in written[1]} <= {'rng_state_1.pth'} # torch writes that one out of Python's sight
    assert (last_checkpoint(RunFolder(two).checkpoints)/'rng_state_1.pth').is_file()
    assert (base/'crew_two'/'said_1').read_text()==''

@pytest.mark.parametrize('name,how', [('tokens', dict(tokens_per_step=256)), ('packed', dict(packing=True, max_length=64)), ('single', dict(per_device_train_batch_size=1))])
def test_in_every_order(name, how, base, data):
    codes,said = together(base/f'crew_{name}', train, base/name, data, note=base/f'{name}_note', **how)
    assert codes==[0, 0], said
    alone(base/f'{name}_one', data, **how)
    assert near(base/f'{name}_one', base/name)<=1e-5
    seen_once(base/f'{name}_note', 2)


# Kills and stops

def test_a_killed_process_ends_the_run_and_it_goes_on(base, data, two):
    folder = base/'killed'
    codes,said = together(base/'crew_killed', train, folder, data, at=5, who=1, do=die, within=60)
    assert codes==[1, -signal.SIGKILL]
    assert said[0].count('\n')==1 and 'SageError: process 0 of 2 cannot reach the others any more; the same command goes on' in said[0]
    assert last_checkpoint(RunFolder(folder).checkpoints).name=='checkpoint-3' and RunFolder(folder).state=='started'
    codes,said = together(base/'crew_killed', train, folder, data)
    assert codes==[0, 0], said
    assert apart(folder, two)==0 and losses(folder)==losses(two)

def test_one_is_asked_to_stop_and_all_do(base, data, two):
    folder = base/'stopped'
    codes,said = together(base/'crew_stopped', train, folder, data, at=4, who=1, do=term)
    assert codes==[128+signal.SIGTERM]*2
    assert all('Stopped: stopped at step 5 of 6; a checkpoint and the adapter so far are saved' in s for s in said), said
    assert RunFolder(folder).state=='stopped'
    codes,said = together(base/'crew_stopped', train, folder, data)
    assert codes==[0, 0] and apart(folder, two)==0 and losses(folder)==losses(two), said

def test_memory_runs_out_in_one(base, data):
    codes,said = together(base/'crew_memory', train, base/'memory', data, at=2, who=1, do=no_memory, within=60)
    assert codes==[1, 1]
    assert said[1].count('\n')==1 and 'out of memory in process 1 of 2: set `gradient_accumulation_steps` to 4 and `per_device_train_batch_size` to 1' in said[1]
    assert 'cannot reach the others' in said[0]

def test_another_number_of_processes(base, data, one):
    folder = base/'fewer'
    codes,said = together(base/'crew_fewer', train, folder, data, at=4, who=0, do=term)
    assert codes==[128+signal.SIGTERM]*2, said
    with pytest.raises(SageError, match='processes × gradient_accumulation_steps: 2 × 2 → 1 × 2.*start anew'): LoRATrainer(config(folder, data), quiet=True).train()
    assert near(one, alone(folder, data))<=1e-5


# Divided

def test_fsdp2(base, data, one):
    codes,said = together(base/'crew_fsdp', train, base/'fsdp', data, env=fsdp2, note=base/'fsdp_note')
    assert codes==[0, 0], said
    assert near(one, base/'fsdp')<=1e-5
    seen_once(base/'fsdp_note', 2)
    from peft import PeftModel
    from sage_finetune.loading import load_model
    PeftModel.from_pretrained(load_model('sage-tiny'), base/'fsdp'/'lora_weights')
    assert read_json(RunFolder(base/'fsdp').config)['_division']=='FSDP'
    with pytest.raises(SageError, match='what divides the model among processes: FSDP → None'): alone(base/'fsdp', data)
