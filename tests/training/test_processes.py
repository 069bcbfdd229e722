"""Several processes that train as one, on a CPU over gloo

Against one process, row by row, through kills and stops, and with the model divided among them.

The processes are forked from one that has imported everything, with the environment that a launcher gives them;
the launcher itself is started where it is what is tested.
"""
import gc
import json
import os
import shutil
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

from quick import Forked, few, forked, two_layers
from sage_finetune.training.callbacks import read_metrics
from sage_finetune.core.disk import write_json
from sage_finetune.config import LoRAConfig, read_json, SageError, TrainingConfig
from sage_finetune.core.run_folder import last_checkpoint, RunFolder
from sage_finetune.runs.launch import launch_command
from sage_finetune.trainer import LoRATrainer, Stopped

pytestmark = pytest.mark.skipif(os.name!='posix', reason='needs signals and processes as POSIX has them')

fsdp2 = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP',
             FSDP_STATE_DICT_TYPE='FULL_STATE_DICT',
             # what accelerate makes of `launch.ways['fsdp2']`
             FSDP_RESHARD_AFTER_FORWARD='true', FSDP_CPU_RAM_EFFICIENT_LOADING='true')
zero2 = dict(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_ZERO_STAGE='2', ACCELERATE_MIXED_PRECISION='no',
             ACCELERATE_CONFIG_DS_FIELDS='')
zero3 = dict(zero2, ACCELERATE_DEEPSPEED_ZERO_STAGE='3', ACCELERATE_DEEPSPEED_ZERO3_INIT='false',
             ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL='true')


# What is trained: 23 counted words, 21 of them to learn from, so that neither rows nor passes come out even

def config(folder, data, **more):
    settings = dict(model_name=two_layers, data_path=data, output_dir=folder, test_size=0.1, num_train_epochs=2,
                    save_steps=3, per_device_train_batch_size=2,
                    gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1, report_to='none',
                    lora=LoRAConfig(r=4, lora_dropout=0.0))
    return TrainingConfig(**(settings | more))


class Noted(LoRATrainer):
    "Notes each row that is trained on, and does something at the end of a step"
    def __init__(self, *args, at=None, do=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.at,self.do,self.rows = at,do,[]

    def setup_trainer(self):
        super().setup_trainer()
        real = self.trainer.training_step
        def training_step(model, inputs, *args, **kwargs):
            self.rows += map(tuple, inputs['input_ids'].tolist())
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
def losses(folder):
    return [(m['step'], k, m[k]) for m in read_metrics(RunFolder(folder).metrics) for k in ('loss', 'eval_loss')
            if k in m]
def near(one, two):
    "How far the adapters of two runs are apart; their losses must agree"
    assert [l[:2] for l in losses(one)]==[l[:2] for l in losses(two)]
    assert max(abs(a[2]-b[2]) for a,b in zip(losses(one), losses(two)))<=1e-5
    norms = [[m['grad_norm'] for m in read_metrics(RunFolder(f).metrics) if 'grad_norm' in m] for f in (one, two)]
    assert norms[0]==pytest.approx(norms[1], rel=1e-4) # Adam would forgive a gradient that is twice as long
    return apart(one, two)


# Processes

def _child(place, rank, work, args, more, env):
    os.environ.update(env)
    gc.freeze()
    sys.stderr = sys.stdout = open(place/f'said_{rank}', 'w', buffering=1)
    torch.set_num_threads(1)
    try:
        work(*args, **more)
        code = 0
    except (KeyboardInterrupt, SageError, ValueError, OSError) as e:
        print(f'{type(e).__name__}: {e}')
        code = 128+getattr(e, 'signal', 2) if isinstance(e, KeyboardInterrupt) else 1
    sys.stderr.flush()
    os._exit(code)

def together(place, work, *args, n=2, within=120, env={}, **more):
    "`work` in `n` processes that a launcher might have started; their exit statuses, and what they said"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    place.mkdir(parents=True, exist_ok=True)
    of = lambda r: dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1', **env)
    crew = [forked.Process(target=_child, args=(place, r, work, args, more, of(r))) for r in range(n)]
    for p in crew: p.start()
    end = time.monotonic()+within
    for p in crew: p.join(max(0, end-time.monotonic()))
    hung = [p.pid for p in crew if p.is_alive()]
    for p in crew:
        p.kill()
        p.join()
    assert not hung, 'a process waits for ever'
    return [p.exitcode for p in crew],[(place/f'said_{r}').read_text() for r in range(n)]

def rank(): return int(os.environ['RANK'])

def train(folder, data, note=None, at=None, who=None, do=None, **more):
    "Train; `do` is called at the end of step `at`, in process `who`"
    run = Noted(config(folder, data, **more), quiet=True, at=at if who in (None, rank()) else None, do=do)
    written = []
    watch = [True]
    def opened(event, args):
        if (watch and event=='open' and isinstance(args[0], (str, bytes)) and isinstance(args[1], str)
            and set(args[1])&set('wax+') and os.fsdecode(args[0]).startswith(str(folder))):
            written.append(os.path.relpath(os.fsdecode(args[0]), folder))
    sys.addaudithook(opened)
    run.train()
    watch.clear()
    if note:
        write_json(f'{note}_{rank()}', dict(rows=run.rows, cached=run.data_report.cached,
                                            every=[list(r['input_ids']) for r in run.trainer.train_dataset],
                                            written=written, pad=run.trainer.data_collator.pad_id))

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    LoRATrainer(config(folder, data, **(dict(gradient_accumulation_steps=4) | more)), quiet=True).train()
    torch.set_num_threads(threads)
    return folder

@pytest.fixture(scope='module')
def one(base, data): return alone(base/'one', data)
@pytest.fixture(scope='module')
def two(base, data):
    codes,said = together(base/'crew_two', train, base/'two', data, note=base/'two_note',
                          env=dict(SAGE_CACHE=str(base/'cache')))
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
    assert (not {bare(r) for r in notes[0]['rows'] if bare(r)} & {bare(r) for r in notes[1]['rows'] if bare(r)}
            or epochs>1)
    return rows.count(())

def test_two_processes_are_one(one, two, base):
    assert near(one, two)<=1e-5
    # 21 rows, 2 in a pass: 11 passes for two, so one comes away empty-handed each time
    assert seen_once(base/'two_note', 2)==2
    assert read_json(RunFolder(two).config)['_processes']==2
    assert read_json(RunFolder(two).results)['loss_after']==pytest.approx(
        read_json(RunFolder(one).results)['loss_after'], abs=1e-5)

def test_only_the_first_writes(two, base):
    written = [read_json(base/f'two_note_{r}')['written'] for r in range(2)]
    assert 'metrics.jsonl' in written[0]
    assert {Path(w).name for w in written[1]} <= {'rng_state_1.pth'} # torch writes that one out of Python's sight
    assert (last_checkpoint(RunFolder(two).checkpoints)/'rng_state_1.pth').is_file()
    assert (base/'crew_two'/'said_1').read_text()==''

def test_the_first_prepares_the_data_and_the_others_find_it(two, base):
    assert [read_json(base/f'two_note_{r}')['cached'] for r in range(2)]==[False, True]

@pytest.mark.parametrize('name,how',
                         [('tokens', dict(tokens_per_step=240)), *few([
                             ('packed', dict(packing=True, max_length=64)),
                             ('single', dict(per_device_train_batch_size=1))], 0)])
def test_in_every_order(name, how, base, data):
    codes,said = together(base/f'crew_{name}', train, base/name, data, note=base/f'{name}_note', **how)
    assert codes==[0, 0], said
    alone(base/f'{name}_one', data, **how)
    assert near(base/f'{name}_one', base/name)<=1e-5
    assert seen_once(base/f'{name}_note', 2)>0 or name=='single'

@pytest.mark.slow
def test_rows_with_and_without_pictures(base):
    image = pytest.importorskip('PIL.Image')
    from sage_finetune.base.tiny_vision import tiny_vision_model
    tiny_vision_model(base/'sees')
    for c in ('red', 'blue'): image.new('RGB', (28, 28), c).save(base/f'{c}.png')
    seen = (lambda c,i: dict(messages=[dict(role='user', content=[dict(type='image', image=f'{c}.png'), dict(
        type='text', text=f'{i}. Which colour?')]), dict(role='assistant', content=f'It is {c}.')]))
    # two passes have no picture
    rows = ([seen(('red', 'blue')[i%2], i) for i in range(4)]
            + [dict(question=f'{i} words?', answer='word '*i+'.') for i in range(5)])
    (base/'pictures.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    how = dict(model_name=str(base/'sees'), test_size=0.0,
               lora=LoRAConfig(r=4, lora_dropout=0.0, target_modules='all-linear'))
    codes,said = together(base/'crew_pictures', train, base/'two_pictures', base/'pictures.jsonl',
                          note=base/'pictures_note', **how)
    assert codes==[0, 0], said
    assert near(alone(base/'one_pictures', base/'pictures.jsonl', **how), base/'two_pictures')<=1e-5
    assert seen_once(base/'pictures_note', 2)>0


# Kills and stops

def test_a_killed_process_ends_the_run_and_it_goes_on(base, data, two):
    folder = base/'killed'
    codes,said = together(base/'crew_killed', train, folder, data, at=5, who=1, do=die, within=60)
    assert codes==[1, -signal.SIGKILL]
    assert (said[0].count('\n')==1 and 'SageError: process 0 of 2 cannot reach the others any more; '
            'the same command resumes' in said[0])
    assert last_checkpoint(RunFolder(folder).checkpoints).name=='checkpoint-3' and RunFolder(folder).state=='started'
    codes,said = together(base/'crew_killed', train, folder, data)
    assert codes==[0, 0], said
    assert apart(folder, two)==0 and losses(folder)==losses(two)

def test_one_is_asked_to_stop_and_all_do(base, data, two):
    folder = base/'stopped'
    codes,said = together(base/'crew_stopped', train, folder, data, at=4, who=1, do=term)
    assert codes==[128+signal.SIGTERM]*2
    assert all('Stopped: stopped at step 5 of 6; a checkpoint and the adapter so far are saved' in s
               for s in said), said
    assert RunFolder(folder).state=='stopped'
    codes,said = together(base/'crew_stopped', train, folder, data)
    assert codes==[0, 0] and apart(folder, two)==0 and losses(folder)==losses(two), said

def test_memory_runs_out_in_one(base, data):
    codes,said = together(base/'crew_memory', train, base/'memory', data, at=2, who=1, do=no_memory, within=60)
    assert codes==[1, 1]
    assert (said[1].count('\n')==1 and 'out of memory in process 1 of 2: '
            'set `gradient_accumulation_steps` to 4 and `per_device_train_batch_size` to 1' in said[1])
    assert 'cannot reach the others' in said[0]

def train_to_nothing(folder, data):
    "In process 1 the sum of the losses becomes no number in step 4"
    run = Noted(config(folder, data), quiet=True, at=3,
                do=lambda: rank() and run.trainer.meter.window.fill_(float('nan')))
    run.train()

@pytest.mark.slow
def test_the_loss_of_one_is_no_number(base, data):
    codes,said = together(base/'crew_nan', train_to_nothing, base/'nan', data, within=60)
    assert codes==[1, 1]
    assert all('NotFinite: the loss is not finite (NaN or infinity) at step' in s for s in said), said
    assert last_checkpoint(RunFolder(base/'nan').checkpoints) is None or RunFolder(base/'nan').state=='started'

@pytest.mark.slow
def test_another_number_of_processes(base, data, one):
    folder = base/'fewer'
    codes,said = together(base/'crew_fewer', train, folder, data, at=4, who=0, do=term)
    assert codes==[128+signal.SIGTERM]*2, said
    with pytest.raises(SageError, match='processes × gradient_accumulation_steps: 2 × 2 → 1 × 2.*start anew'):
        LoRATrainer(config(folder, data), quiet=True).train()
    assert near(one, alone(folder, data))<=1e-5

@pytest.mark.slow
def test_one_process_becomes_two(base, data, two):
    folder = base/'more'
    run = Noted(config(folder, data, gradient_accumulation_steps=4), quiet=True, at=4, do=lambda: run.stop())
    with pytest.raises(Stopped): run.train()
    codes,said = together(base/'crew_more', train, folder, data)
    assert codes==[0, 0] and near(two, folder)<=1e-5, said


# Divided

@pytest.fixture(scope='module')
def divided(base, data):
    codes,said = together(base/'crew_fsdp', train, base/'fsdp', data, env=fsdp2, note=base/'fsdp_note')
    assert codes==[0, 0], said
    return base/'fsdp'

def test_fsdp2(base, data, one, divided):
    assert near(one, divided)<=1e-5
    seen_once(base/'fsdp_note', 2)
    from peft import PeftModel
    from sage_finetune.base.loading import load_model
    PeftModel.from_pretrained(load_model(two_layers), RunFolder(divided).lora_weights)
    assert read_json(RunFolder(divided).config)['_division']=='FSDP'
    with pytest.raises(SageError, match='what divides the model among processes: FSDP → None'): alone(divided, data)

@pytest.mark.slow
def test_fsdp2_goes_on_after_a_kill(base, data, divided):
    folder = base/'fsdp_killed'
    codes,said = together(base/'crew_fsdp_killed', train, folder, data, env=fsdp2, at=5, who=1, do=die, within=60)
    assert codes==[1, -signal.SIGKILL] and last_checkpoint(RunFolder(folder).checkpoints).name=='checkpoint-3', said
    codes,said = together(base/'crew_fsdp_killed', train, folder, data, env=fsdp2)
    assert codes==[0, 0], said
    assert apart(folder, divided)==0 and losses(folder)==losses(divided)
    codes,said = together(base/'crew_fsdp_killed', train, folder, data, env=fsdp2) # nothing is left to do
    assert codes==[0, 0] and apart(folder, divided)==0, said

def train_in_parts(folder, data, **more):
    run = LoRATrainer(config(folder, data, **more), quiet=True)
    run.train()
    frozen = {n: p for n,p in run.model.named_parameters() if not p.requires_grad and p.ndim>1}
    assert frozen and all(hasattr(p, 'full_tensor') for p in frozen.values()), (
        'a weight that no process shares with the other')

@pytest.mark.slow
@pytest.mark.parametrize('half', [dict(), dict(bf16=True)], ids=['fp32', 'bf16'])
def test_four_bits_divided(base, data, half):
    "In bf16 the packed bytes are stored as numbers of bf16, and stay what they are"
    how,name = dict(load_in_4bit=True, max_steps=4) | half,f'four_{len(half)}'
    codes,said = together(base/f'crew_{name}', train_in_parts, base/name, data, env=fsdp2, **how)
    assert codes==[0, 0], said
    one = alone(base/f'{name}_one', data, **how)
    if not half: assert near(one, base/name)<=1e-5
    # what is added up in another order is rounded to 8 bits otherwise
    assert [l[2] for l in losses(one)]==pytest.approx([l[2] for l in losses(base/name)], rel=1e-2)

@pytest.mark.parametrize('how,why', [(dict(load_in_8bit=True), '`load_in_8bit=True`: FSDP cannot divide'), (dict(
    load_best_model_at_end=True), '`load_best_model_at_end` needs the whole model'),
                                     (dict(lora=dict(init_lora_weights='pissa')),
                                      '`init_lora_weights` needs the whole model')])
def test_what_cannot_be_divided_is_refused(how, why, base, data, monkeypatch):
    for name,value in dict(fsdp2, WORLD_SIZE='2', RANK='0').items(): monkeypatch.setenv(name, value)
    run = LoRATrainer(config(base/'refused', data, **how), quiet=True)
    with pytest.raises(ValueError, match=why.replace('(', r'\(')): run.load_model_and_tokenizer()

@pytest.mark.slow
@pytest.mark.parametrize('way', ['zero2', 'zero3'])
def test_deepspeed(way, base, data, one, tmp_path):
    pytest.importorskip('deepspeed')
    folder = base/way
    config(folder, data).save(tmp_path/'run.json')
    started = launched(tmp_path, 'run', 'run.json', '--nproc', '2', '--config', way)
    said = started.communicate(timeout=300)[0]
    assert started.returncode==0, said
    assert near(one, folder)<=2e-5
    with pytest.raises(SageError, match='what divides the model among processes: DeepSpeed → None'):
        alone(folder, data)

@pytest.mark.slow
def test_deepspeed_goes_on_after_a_kill(base, data, one):
    pytest.importorskip('deepspeed')
    folder = base/'zero_killed'
    codes,said = together(base/'crew_zero', train, folder, data, env=zero3, at=5, who=1, do=die, within=300)
    assert codes==[1, -signal.SIGKILL] and last_checkpoint(RunFolder(folder).checkpoints).name=='checkpoint-3', said
    codes,said = together(base/'crew_zero', train, folder, data, env=zero3, within=300)
    assert codes==[0, 0] and near(one, folder)<=2e-5, said


# What goes over the wires: the formulas of the page `many machines`

def weigh(folder, data, **more):
    "Bytes that the collectives of the steps of a run put into this process's hands"
    import torch.distributed as dist
    seen = dict(gathered=0, added=0)
    run = LoRATrainer(config(folder, data, **more), quiet=True)
    if 'ACCELERATE_USE_FSDP' in os.environ:
        import torch.distributed.fsdp._fully_shard._fsdp_collectives as c
        for name,real in [(n, getattr(c, n)) for n in dir(c) if n=='DefaultAllGather']:
            def call(self, output_tensor, input_tensor, *args, _real=real.__call__, **kwargs):
                seen['gathered'] += output_tensor.numel()*output_tensor.element_size() if run.model.training else 0
                return _real(self, output_tensor, input_tensor, *args, **kwargs)
            real.__call__ = call
    else:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        def hook(state, bucket):
            seen['added'] += bucket.buffer().numel()*bucket.buffer().element_size()
            return allreduce_hook(state, bucket)
        setup = run.setup_trainer
        def with_hook():
            setup()
            prepare = run.trainer.accelerator.prepare_model
            def prepare_model(*args, **kwargs):
                model = prepare(*args, **kwargs)
                if hasattr(model, 'register_comm_hook'): model.register_comm_hook(None, hook)
                return model
            run.trainer.accelerator.prepare_model = prepare_model
        run.setup_trainer = with_hook
    run.train()
    weights = {n: p.numel()*p.element_size() for n,p in run.model.named_parameters() if not p.requires_grad}
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    write_json(f'{folder}_wires_{rank()}', dict(seen, layers=sum(v for n,v in weights.items() if '.layers.' in n),
                                                ends=sum(v for n,v in weights.items() if '.layers.' not in n),
                                                trained=trained))

@pytest.mark.slow
def test_bytes_over_the_wires(base, data):
    how = dict(model_name='sage-tiny', max_steps=3, test_size=0.0)
    codes,said = together(base/'crew_wires', weigh, base/'ddp', data, **how)
    assert codes==[0, 0], said
    ddp = read_json(f'{base}/ddp_wires_0')
    assert ddp['added']==3*4*ddp['trained'] # once for each step of two passes
    codes,said = together(base/'crew_wires', weigh, base/'fsdp_wires', data, env=fsdp2, **how)
    assert codes==[0, 0], said
    fsdp = read_json(f'{base}/fsdp_wires_wires_0')
    passes = 3*2
    # the first pass finds embedding and head at hand
    assert fsdp['gathered']==pytest.approx(passes*(2*(fsdp['layers']+4*fsdp['trained'])+fsdp['ends']), rel=.03)


# The launcher itself

def launched(home, *args):
    "The command that starts the launcher, forked; the launcher and its processes are new interpreters"
    return Forked(['sage-finetune', *args], cwd=home, env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True,
                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def children(folder):
    "Processes of the launcher that are still there"
    mine = []
    for p in Path('/proc').glob('[0-9]*/cmdline') if Path('/proc').is_dir() else ():
        try: words = p.read_bytes()
        except OSError: continue
        if b'sage_finetune.runs.launch' in words and os.fsencode(folder) in words: mine.append(words)
    return mine

def reached(folder): return max((m['step'] for m in read_metrics(RunFolder(folder).metrics)), default=0)

def until(happened, within=60):
    end = time.monotonic()+within
    while not happened() and time.monotonic()<end: time.sleep(.05)
    return happened()

@pytest.mark.slow
def test_ctrl_c_of_the_command(base, data, tmp_path):
    folder = tmp_path/'run'
    config(folder, data, num_train_epochs=60, save_steps=1000).save(tmp_path/'run.json')
    started = launched(tmp_path, 'run', str(tmp_path/'run.json'), '--nproc', '2')
    try:
        assert until(lambda: reached(folder)>2 or started.poll() is not None) and started.poll() is None
        started.send_signal(signal.SIGINT)
        said = started.communicate(timeout=60)[0]
    finally: started.kill()
    assert started.returncode==130, said
    assert said.startswith('accelerate launch --multi_gpu') and 'Traceback' not in said
    assert said.splitlines()[-1].startswith('stopped at step ') and said.count('stopped at step ')==1
    assert 'error: ' not in said
    assert RunFolder(folder).state=='stopped' and not children(tmp_path)

@pytest.mark.slow
def test_the_launcher_is_killed(base, data, tmp_path):
    folder = tmp_path/'run'
    config(folder, data, num_train_epochs=60, save_steps=1000).save(tmp_path/'run.json')
    started = launched(tmp_path, 'run', str(tmp_path/'run.json'), '--nproc', '2')
    assert until(lambda: reached(folder)>2 or started.poll() is not None) and started.poll() is None
    started.kill()
    started.communicate(timeout=60)
    assert until(lambda: not children(tmp_path))
    assert RunFolder(folder).state=='stopped'

@pytest.mark.slow
def test_an_error_is_one_line(tmp_path):
    config(tmp_path/'run', tmp_path/'nothing.jsonl').save(tmp_path/'run.json')
    started = launched(tmp_path, 'run', str(tmp_path/'run.json'), '--nproc', '2')
    said = started.communicate(timeout=60)[0].splitlines()
    assert started.returncode==1 and len(said)==2 and 'nothing.jsonl' in said[1] and said[1].startswith('error: '), said

def test_the_command_is_what_the_environment_was_made_of():
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env
    args = launch_command_parser().parse_args(launch_command('run', 2, 'fsdp2')[2:])
    made = prepare_multi_gpu_env(args)
    assert {k: made[k] for k in fsdp2}==fsdp2

@pytest.mark.slow
def test_two_launchers_as_on_two_machines(base, data, two, tmp_path):
    config(tmp_path/'run', data).save(tmp_path/'run.json')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    many = ['--nproc', '1', '--nodes', '2', '--main-process-ip', '127.0.0.1', '--main-process-port', str(port),
            '--machine-rank']
    started = [launched(tmp_path, 'run', str(tmp_path/'run.json'), *many, str(i)) for i in range(2)]
    said = [p.communicate(timeout=120)[0] for p in started]
    assert [p.returncode for p in started]==[0, 0], said
    assert near(two, tmp_path/'run')<=1e-6 and said[0].count('Adapter: ')==1 and 'Adapter: ' not in said[1]

@pytest.mark.slow
def test_a_file_of_accelerate(base, data, one, tmp_path):
    "Parts saved one by one, and a number format that gives way to that of the run"
    config(tmp_path/'run', data).save(tmp_path/'run.json')
    parts = dict(fsdp_version=2, fsdp_auto_wrap_policy='TRANSFORMER_BASED_WRAP',
                 fsdp_state_dict_type='SHARDED_STATE_DICT', fsdp_reshard_after_forward=True,
                 fsdp_cpu_ram_efficient_loading=True)
    write_json(tmp_path/'accelerate.json',
               dict(compute_environment='LOCAL_MACHINE', distributed_type='FSDP', mixed_precision='bf16',
                    num_processes=2, num_machines=1, fsdp_config=parts))
    for _ in range(2):
        started = launched(tmp_path, 'run', str(tmp_path/'run.json'), '--config', 'accelerate.json')
        said = started.communicate(timeout=120)[0]
        assert started.returncode==0 and near(one, tmp_path/'run')<=1e-5, said
        for left in ('checkpoints/checkpoint-6', 'lora_weights'):
            shutil.rmtree(tmp_path/'run'/left) # the second time it goes on

@pytest.mark.slow
def test_from_python(base, data, two, tmp_path):
    from sage_finetune.runs.launch import launch
    config(tmp_path/'run', data).save(tmp_path/'run.json')
    before,told = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},[]
    assert launch(tmp_path/'run.json', 2, say=told.append)==0
    assert {n: signal.getsignal(n) for n in before}==before and told[0].startswith('accelerate launch')
    assert near(two, tmp_path/'run')<=1e-6
