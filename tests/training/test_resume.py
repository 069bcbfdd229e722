"""A run and what can happen to it: what was lost, and how it was resumed

`pytest -s tests/training/test_resume.py` prints the table. Faults that end a process happen in a process of their own,
forked from one that has imported everything. What comes of a run is compared bit by bit with an undisturbed one.
"""
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from quick import few, forked, two_layers
from sage_finetune.training import callbacks, loop, resume
from sage_finetune.config import LoRAConfig, read_json, SageError, TrainingConfig
from sage_finetune.core.run_folder import checkpoint_fault, complete_marker, last_checkpoint, only_run, RunFolder
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.runs.verify import verify_resume
from sage_finetune.trainer import LoRATrainer, Stopped

needs_posix = pytest.mark.skipif(not forked, reason='needs signals and processes as POSIX has them')


# What is trained: 22 sums, 2 × 2 of them behind each step, so 6 steps in a pass; dropout, and an evaluation at the
# end of each pass

def config(folder, data, **more):
    settings = dict(model_name=two_layers, data_path=data, output_dir=folder, test_size=0.1, max_steps=14,
                    save_steps=3, per_device_train_batch_size=2,
                    gradient_accumulation_steps=2, learning_rate=5e-3, logging_steps=2, report_to='none',
                    lora=LoRAConfig(r=4, lora_dropout=0.1))
    return TrainingConfig(**(settings | more))


class Trouble(TrainerCallback):
    """Calls `do(run)` once, at `step`

    Where a step begins ('begin'), after its first micro-batch ('pass'), when it is done ('end') or saved ('save').
    """
    def __init__(self, run, place, step, do): self.run,self.place,self.step,self.do = run,place,step,do

    def _at(self, place, step):
        if self.do and (place,step)==(self.place, self.step):
            do,self.do = self.do,None
            do(self.run)

    def on_step_begin(self, args, state, control, **kwargs): self._at('begin', state.global_step+1)
    def on_substep_end(self, args, state, control, **kwargs): self._at('pass', state.global_step+1)
    def on_step_end(self, args, state, control, **kwargs): self._at('end', state.global_step)
    def on_save(self, args, state, control, **kwargs): self._at('save', state.global_step)


class Troubled(LoRATrainer):
    def __init__(self, *args, trouble=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.trouble = trouble
        self.heard = []
    def callbacks(self): return [*super().callbacks(), *([Trouble(self, *self.trouble)] if self.trouble else [])]
    def say(self, what):
        self.heard.append(str(what))
        super().say(what)


def adapter(folder): return (RunFolder(folder).lora_weights/'adapter_model.safetensors').read_bytes()
def weights(folder):
    from safetensors.torch import load
    return load(adapter(folder))
def losses(folder):
    return [(m['step'], k, m[k]) for m in callbacks.read_metrics(RunFolder(folder).metrics)
            for k in ('loss', 'eval_loss') if k in m]
def reached(folder): return max((m['step'] for m in callbacks.read_metrics(RunFolder(folder).metrics)), default=0)


# Processes

def _in_child(said, work, args, more):
    sys.stderr = open(said, 'a', buffering=1)
    gc.freeze()
    torch.set_num_threads(1)
    try: work(*args, **more)
    except (KeyboardInterrupt, SageError, ValueError, OSError) as e:
        print(f'{type(e).__name__}: {e}', file=sys.stderr)
        code = 128+getattr(e, 'signal', 2) if isinstance(e, KeyboardInterrupt) else 1
    else: code = 0
    sys.stderr.flush()
    os._exit(code)

def start(work, *args, **more):
    "`work` in a process of its own; what it says is in the file `said`"
    said = Path(args[0]).with_suffix('.said')
    said.parent.mkdir(parents=True, exist_ok=True)
    said.write_text('')
    process = forked.Process(target=_in_child, args=(said, work, args, more))
    process.start()
    process.said = said
    return process

def finished(process, within=120):
    process.join(within)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode,process.said.read_text()

def wait_until(happened, process=None, within=60):
    end = time.monotonic()+within
    while not happened() and time.monotonic()<end and (process is None or process.is_alive()): time.sleep(.005)
    return happened()

def train(folder, data, **more): LoRATrainer(config(folder, data, **more)).train()

def killed_while_writing(folder, data, place, step, **more):
    "Die at `place` of writing the checkpoint of `step`"
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    at = f'checkpoint-{step}{os.sep}'
    save,mark,remove = torch.save, callbacks.mark_complete, callbacks.remove_checkpoint
    def torn(obj, f, *args, **kwargs):
        save(obj, f, *args, **kwargs)
        if at in f'{f}' and place==Path(f).name:
            os.truncate(f, os.path.getsize(f)//2)
            die()
    def before_marker(folder): die() if at in f'{folder}{os.sep}' and place=='marker' else mark(folder)
    def half_removed(folder):
        if at in f'{folder}{os.sep}' and place=='removing':
            (folder/complete_marker).unlink()
            (folder/'scheduler.pt').unlink()
            die()
        remove(folder)
    torch.save,callbacks.mark_complete,callbacks.remove_checkpoint = torn,before_marker,half_removed
    train(folder, data, **more)

def killed_at(folder, data, place, step, **more):
    "Die where a step begins, after a micro-batch, when it is done or saved, or while its checkpoint is written"
    if place not in ('begin', 'pass', 'end', 'save'): return killed_while_writing(folder, data, place, step, **more)
    die = place,step,lambda run: os.kill(os.getpid(), signal.SIGKILL)
    Troubled(config(folder, data, **more), trouble=die).train()


# The run that nothing happens to, and the table

@pytest.fixture(scope='module')
def base(tmp_path_factory): return tmp_path_factory.mktemp('faults')
@pytest.fixture(scope='module')
def data(base): return create_sample_data(base/'sums.jsonl', 'qa', num_samples=24)
@pytest.fixture(scope='module')
def undisturbed(base, data):
    threads = torch.get_num_threads()
    torch.set_num_threads(1) # the order of additions depends on it
    LoRATrainer(config(base/'undisturbed', data), quiet=True).train()
    yield base/'undisturbed'
    torch.set_num_threads(threads)

@pytest.fixture(scope='module', autouse=True)
def table():
    rows = []
    yield rows
    print('\n' + '\n'.join(f'{fault:48} {lost:34} {how:58} {seconds:5.1f} s'
                           for fault,lost,how,seconds in [('fault', 'lost', 'how it went on', 0), *rows]))

@pytest.fixture
def told(table):
    began = time.monotonic()
    return lambda fault,how,lost='nothing': table.append((fault, lost, how, time.monotonic()-began))

def same(folder, undisturbed):
    "Whether a run came to the bits of the other, and wrote the same losses"
    assert RunFolder(folder).state=='trained'
    assert adapter(folder)==adapter(undisturbed)
    assert losses(folder)==losses(undisturbed)
    return True


# Kills

@needs_posix
@pytest.mark.parametrize('times', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(base, data, told, times):
    steps_in_all,folder = 5*times, base/f'killed_{times}'
    long = dict(max_steps=steps_in_all, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
                gradient_accumulation_steps=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    LoRATrainer(config(base/f'long_{times}', data, **long), quiet=True).train()
    torch.set_num_threads(threads)
    dice,kills,steps = random.Random(0), 0, []
    for _ in range(times):
        before,wanted = reached(folder),dice.randint(1, 5)
        process = start(train, folder, data, **long)
        def trains(): return reached(folder)>=before+wanted # it is so many steps further
        if dice.random()<.9: wait_until(trains, process) # else it is killed while it loads
        time.sleep(dice.uniform(0, .05)) # in a step, or while its checkpoint is written
        process.kill()
        code,_ = finished(process)
        kills += code==-signal.SIGKILL
        steps.append(reached(folder))
    assert kills==times and times-1<steps[-1]<steps_in_all, steps
    assert finished(start(train, folder, data, **long))[0]==0
    assert same(folder, base/f'long_{times}')
    told(f'kill -9 at {times} random moments', f'{times+1} starts to the end, after steps '
         f'{", ".join(map(str, steps[4::5]))}', 'at most 2 steps each time, repeated')


@needs_posix
@pytest.mark.slow
def test_verified_after_forty_crash_points(base, data, told):
    places = 'begin', 'pass', 'end', 'save', 'optimizer.pt', 'rng_state.pth', 'scheduler.pt', 'marker'
    points = [(places[i%8], 2+2*i) for i in range(40)]
    points[17] = 'pass',37 # the last step of an epoch, the 36th, has one micro-batch and no place between two
    long,folder = dict(max_steps=84, save_steps=2, logging_steps=1, gradient_accumulation_steps=2), base/'forty'
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    LoRATrainer(config(base/'forty_undisturbed', data, **long), quiet=True).train()
    lines = []
    for place,step in points:
        code,said = finished(start(killed_at, folder, data, place, step, **long))
        begin = said.rpartition('Resuming from step ')[2].split('\n')[0]
        lines.append(f"{place:>14} {step:>4} {begin if begin.isdigit() else 'start':>10}")
        assert code==-signal.SIGKILL, (place, step, said)
    assert finished(start(train, folder, data, **long))[0]==0
    assert same(folder, base/'forty_undisturbed')
    found = verify_resume(folder)
    assert found.ok, found
    file = RunFolder(folder).checkpoints/'checkpoint-82'/'optimizer.pt'
    moments = torch.load(file, weights_only=True)
    moments['state'][5]['exp_avg'].view(-1)[0] += 1e-9
    torch.save(moments, file)
    changed = verify_resume(folder)
    torch.set_num_threads(threads)
    assert not changed.ok and any('exp_avg of ' in f and '(state 5)' in f for f in changed.faults), changed.faults
    print(f"\n{'killed at':>14} {'step':>4} {'went on from':>10}", *lines, '', found, '', *changed.faults, sep='\n')
    told('kill -9 at 40 points of one run', '41 starts to the end; `verify` confirms it', 'at most 2 steps, repeated')


@needs_posix
@pytest.mark.parametrize('place,step,goes_on', few([
    ('optimizer.pt', 6, 3), ('removing', 3, 9), ('rng_state.pth', 9, 6), ('marker', 6, 3)]))
def test_killed_while_a_checkpoint_is_written(place, step, goes_on, base, data, undisturbed, told):
    folder = base/f'write_{place}'
    assert finished(start(killed_while_writing, folder, data, place, step))[0]==-signal.SIGKILL
    assert last_checkpoint(RunFolder(folder).checkpoints).name==f'checkpoint-{goes_on}'
    code,said = finished(start(train, folder, data))
    assert code==0 and f'Resuming from step {goes_on}' in said, said
    if place!='removing': assert f'checkpoint-{step} is passed over: it was not finished' in said
    assert same(folder, undisturbed)
    told(f'kill -9 in a checkpoint ({place})', f'from step {goes_on}, the checkpoint before',
         'at most 3 steps, repeated')


@needs_posix
def test_each_file_of_a_checkpoint_torn_in_turn(base, data, undisturbed, told):
    folder = base/'torn'
    assert finished(start(killed_while_writing, folder, data, 'marker', 9))[0]==-signal.SIGKILL
    where = RunFolder(folder).checkpoints
    newest = where/'checkpoint-6'
    files = sorted(p.relative_to(newest) for p in newest.rglob('*') if p.is_file())
    assert {'COMPLETE', 'adapter_model.safetensors', 'optimizer.pt', 'rng_state.pth', 'scheduler.pt',
            'trainer_state.json', 'window.json'} <= {str(f) for f in files}
    for f in files:
        whole = (newest/f).read_bytes()
        for torn in (whole[:len(whole)//2], b'', whole[:-1]+bytes([whole[-1]^1]), None):
            (newest/f).unlink() if torn is None else (newest/f).write_bytes(torn)
            heard = []
            assert last_checkpoint(where, heard.append).name=='checkpoint-3', (f, torn and len(torn))
            assert any(line.startswith('checkpoint-6 is passed over: ') for line in heard)
        (newest/f).write_bytes(whole)
    assert checkpoint_fault(newest) is None
    os.truncate(newest/'optimizer.pt', 1000)
    run = Troubled(config(folder, data), quiet=True)
    run.train()
    assert any('optimizer.pt has 1,000 of' in h for h in run.heard) and 'Resuming from step 3' in run.heard
    assert same(folder, undisturbed)
    told(f'each of {len(files)} files of a checkpoint torn', 'told which file; from the checkpoint before',
         'at most 3 steps, repeated')


# Interrupts

def interrupted(folder, data, place, step, number=signal.SIGINT, **more):
    run = Troubled(config(folder, data, **more), quiet=True,
                   trouble=(place, step, lambda run: os.kill(os.getpid(), number)))
    with pytest.raises(Stopped) as stop: run.train()
    return run,stop

@needs_posix
@pytest.mark.parametrize('place,step,kept', [
    ('pass', 8, 8), *few([('begin', 1, 0), ('end', 6, 5), ('save', 9, 9), ('end', 13, 13), ('begin', 5, 4),
                                                          ('end', 7, 7)], 0)])
def test_interrupted_anywhere(place, step, kept, base, data, undisturbed, told):
    folder = base/f'interrupted_{place}_{step}'
    run,stop = interrupted(folder, data, place, step)
    assert run.model is None and run.trainer is None
    assert stop.value.signal==signal.SIGINT
    if kept:
        assert f'stopped at step {kept} of 14' in str(stop.value)
        assert RunFolder(folder).state=='stopped' and read_json(RunFolder(folder).stopped)['step']==kept
        assert last_checkpoint(RunFolder(folder).checkpoints).name==f'checkpoint-{kept}'
    again = Troubled(config(folder, data), quiet=True)
    again.train()
    if kept: assert f'Resuming from step {kept}' in again.heard
    assert same(folder, undisturbed)
    told(f'Ctrl-C, step {step} ({place})', f'saved, freed; from step {kept}',
         'the step under way' if kept<step else 'nothing')

@needs_posix
def test_what_an_interrupt_leaves_can_be_asked_and_holds_no_memory(base, data, undisturbed, told):
    from peft import PeftModel
    from sage_finetune.merge_chat import answers, load_for_chat
    folder = base/'asked'
    models = lambda: sum(isinstance(o, PeftModel) for o in gc.get_objects())
    gc.collect()
    before = models()
    run,stop = interrupted(folder, data, 'pass', 5)
    gc.collect()
    assert models()==before and stop.tb is not None, 'the traceback, or something else, holds the model'
    model,tokenizer = load_for_chat(folder)
    assert len(answers(model, tokenizer, ['What is 2 + 3?'], max_new_tokens=4))==1
    kept = {k: v for k,v in weights(folder).items()}
    there = {k.replace('.default', ''): v for k,v in model.state_dict().items() if 'lora_' in k}
    assert kept and all(torch.equal(v, there[k]) for k,v in kept.items())
    run.train() # the same object, as a cell that is run again
    assert same(folder, undisturbed)
    told('interrupted cell, run again in the same process', 'answers at once; the same object goes on', 'nothing')

@needs_posix
def test_interrupted_in_an_evaluation(base, data, undisturbed, told, monkeypatch):
    folder,real,calls = base/'in_evaluation', loop.mean_loss, []
    def slow(model, batches, add=None):
        calls.append(1)
        if len(calls)==2: os.kill(os.getpid(), signal.SIGINT) # the first in training: after step 6
        return real(model, batches, add)
    monkeypatch.setattr(loop, 'mean_loss', slow)
    with pytest.raises(Stopped) as stop: LoRATrainer(config(folder, data), quiet=True).train()
    assert 'stopped at step 5 of 14' in str(stop.value), str(stop.value)
    monkeypatch.setattr(loop, 'mean_loss', real)
    LoRATrainer(config(folder, data), quiet=True).train()
    assert same(folder, undisturbed)
    told('Ctrl-C in an evaluation', 'from the step before it', 'the step before it, repeated')

@needs_posix
def test_sigterm_and_the_exit_code(base, data, undisturbed, told):
    folder = base/'term'
    process = start(train, folder, data)
    assert wait_until(lambda: reached(folder)>=4, process)
    os.kill(process.pid, signal.SIGTERM)
    code,said = finished(process)
    assert (code==128+signal.SIGTERM and 'Stopping after the last whole step' in said
            and 'the same command goes on' in said), said
    assert RunFolder(folder).state=='stopped'
    assert finished(start(train, folder, data))[0]==0
    assert same(folder, undisturbed)
    told('SIGTERM (queue, container)', 'saved, exit code 143; from the last step', 'the step under way')

def slow_pass(folder, data):
    Troubled(config(folder, data), trouble=('pass', 4, lambda run: time.sleep(60))).train()

@needs_posix
def test_a_second_interrupt_stops_at_once(base, data, undisturbed, told):
    folder = base/'twice'
    process = start(slow_pass, folder, data)
    assert wait_until(lambda: last_checkpoint(RunFolder(folder).checkpoints) is not None, process)
    time.sleep(.5)
    os.kill(process.pid, signal.SIGINT)
    assert wait_until(lambda: 'once more stops at once' in process.said.read_text(), process)
    time.sleep(.2)
    assert process.is_alive()
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert finished(process, within=10)[0]==130 and time.monotonic()-began<5
    assert finished(start(train, folder, data))[0]==0
    assert same(folder, undisturbed)
    told('Ctrl-C twice', 'ended at once; from the last checkpoint', 'at most 3 steps, repeated')

def test_a_run_in_another_thread_is_stopped_by_name(base, data, undisturbed, told):
    folder,ended = base/'thread',[]
    run = Troubled(config(folder, data), quiet=True, trouble=('end', 5, lambda run: run.stop()))
    def work():
        try: run.train()
        except Stopped as e: ended.append(str(e))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(ended)==1 and 'stopped at step 5 of 14' in ended[0]
    LoRATrainer(config(folder, data), quiet=True).train()
    assert same(folder, undisturbed)
    told('`stop()` from another thread', 'saved; from step 5', 'nothing')


# The disk

def _mounted(folder, kilobytes):
    "Whether a small file system of its own could be mounted"
    folder.mkdir()
    return (shutil.which('mount') and subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', folder], capture_output=True).returncode==0)

@pytest.mark.parametrize('tracker', few(['tensorboard', 'none']))
def test_the_disk_is_full(tracker, base, data, undisturbed, told):
    small = base/f'small_{tracker}'
    size = sum(p.stat().st_size for p in RunFolder(undisturbed).checkpoints.glob('checkpoint-12/*'))//1024
    if not _mounted(small, int(2.6*size)):
        pytest.skip('may not mount a file system; the limit on the size of a file is tried instead')
    try:
        with pytest.raises(SageError) as full:
            LoRATrainer(config(small/'run', data, report_to=tracker), quiet=True).train()
        assert ('no space left' in str(full.value) and 'free some space' in str(full.value)
                and '\n' not in str(full.value))
        assert last_checkpoint(RunFolder(small/'run').checkpoints).name=='checkpoint-6'
        assert not (RunFolder(small/'run').checkpoints/'checkpoint-9').exists(), 'half a checkpoint only fills the disk'
        subprocess.run(['mount', '-o', 'remount,size=64m', small], check=True)
        run = Troubled(config(small/'run', data, report_to=tracker), quiet=True)
        run.train()
        assert 'Resuming from step 6' in run.heard
        assert same(small/'run', undisturbed)
    finally: subprocess.run(['umount', '-l', small])
    told(f'full disk (tracker: {tracker})', 'one line; once there is room, from step 6', 'at most 3 steps, repeated')

def limited(folder, data):
    import resource
    Troubled(config(folder, data), trouble=('end', 4, lambda run: resource.setrlimit(
        resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY)))).train()

@needs_posix
@pytest.mark.slow
def test_a_file_may_not_grow(base, data, undisturbed, told):
    folder = base/'limited'
    code,said = finished(start(limited, folder, data))
    assert code==1 and 'SageError: cannot write' in said and 'Traceback' not in said, said
    assert last_checkpoint(RunFolder(folder).checkpoints).name=='checkpoint-3'
    assert finished(start(train, folder, data))[0]==0
    assert same(folder, undisturbed)
    told('limit on the size of files', 'one line; from step 3', 'at most 3 steps, repeated')

def test_the_folder_is_read_only(base, data, undisturbed, told):
    place = base/'ro'
    if not _mounted(place, 65536): pytest.skip('may not mount a file system')
    checkpoints = RunFolder(place/'run').checkpoints
    try:
        def close(run): subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', checkpoints], check=True)
        with pytest.raises(SageError, match='cannot write .*checkpoint-6.*read-only.*choose'):
            Troubled(config(place/'run', data), quiet=True, trouble=('begin', 5, close)).train()
        subprocess.run(['umount', checkpoints], check=True)
        subprocess.run(['mount', '-o', 'remount,ro', place], check=True)
        run = LoRATrainer(config(place/'run', data), quiet=True)
        with pytest.raises(SageError, match='cannot write .*read-only.*choose'): run.train()
        assert run.model is None, 'refused before the model is loaded'
        subprocess.run(['mount', '-o', 'remount,rw', place], check=True)
        LoRATrainer(config(place/'run', data), quiet=True).train()
        assert same(place/'run', undisturbed)
    finally:
        for p in (checkpoints, place): subprocess.run(['umount', '-l', p], capture_output=True)
    told('folder read-only, before and while running', 'one line; once writable, from step 3',
         'at most 3 steps, repeated')


# The data

def test_the_data_file_vanishes(base, data, undisturbed, told):
    folder,file = base/'vanished', base/'mine.jsonl'
    shutil.copy(data, file)
    with pytest.raises(Stopped):
        Troubled(config(folder, file), quiet=True, trouble=('end', 5, lambda run: (file.unlink(), run.stop()))).train()
    files = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    run = LoRATrainer(config(folder, file), quiet=True)
    with pytest.raises((FileNotFoundError, SageError), match='mine.jsonl'): run.train()
    assert run.model is None and files=={p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    shutil.copy(data, file)
    Troubled(config(folder, file), quiet=True, trouble=('end', 8, lambda run: file.unlink())).train()
    assert same(folder, undisturbed)
    told('data file gone before a start', 'refused by name, folder untouched; from step 5')
    told('data file gone while running', 'the rows are in the cache; nothing noticed')


# No number

@pytest.mark.parametrize('where', few(['loss', 'gradient']))
def test_the_loss_is_no_number(where, base, data, undisturbed, told):
    folder = base/f'nan_{where}'
    def spoil(run):
        real = run.trainer.compute_loss
        def compute_loss(*args, **kwargs):
            loss = real(*args, **kwargs)
            if where=='gradient':
                loss.register_hook(lambda g: g*float('nan'))
                return loss
            run.trainer.meter.window += float('nan')
            return loss*float('nan')
        run.trainer.compute_loss = compute_loss
    run = Troubled(config(folder, data), quiet=True, trouble=('begin', 8, spoil))
    with pytest.raises(SageError, match=r'not finite \(NaN or infinity\) at step 8.*lower `learning_rate`') as stop:
        run.train()
    assert '\n' not in str(stop.value) and run.model is None
    # what step 6 gave step 7 is known to be a number
    assert RunFolder(folder).state=='stopped' and read_json(RunFolder(folder).stopped)['step']==6
    assert all(torch.isfinite(w).all() for w in weights(folder).values())
    assert adapter(folder)==(RunFolder(folder).checkpoints/'checkpoint-6'/'adapter_model.safetensors').read_bytes()
    with pytest.raises(SageError, match='learning_rate: 0.005 → 0.001.*start anew'):
        LoRATrainer(config(folder, data, learning_rate=1e-3), quiet=True).train()
    LoRATrainer(config(folder, data), quiet=True).train()
    assert same(folder, undisturbed)
    told(f'{where} is no number at step 8', 'adapter and checkpoint of step 6 kept; refuses another rate',
         'the step that led there')


# Memory

def out_of_memory_at(step, rows, times=1, what='compute_loss'):
    def spoil(run):
        target = run.trainer if what=='compute_loss' else run.trainer.optimizer
        name = what if what=='compute_loss' else 'step'
        real,left = getattr(target, name),[times]
        def fails(*args, **kwargs):
            if run.fitted.per_device_train_batch_size==rows and left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError('simulated')
            return real(*args, **kwargs)
        setattr(target, name, fails)
    return 'begin',step,spoil

exact = dict(learning_rate=1e-4, lora=LoRAConfig(r=4, lora_dropout=0.0))

@pytest.fixture(scope='module')
def plain(base, data, undisturbed):
    LoRATrainer(config(base/'plain', data, **exact), quiet=True).train()
    return base/'plain'

def near(folder, other):
    a,b = weights(folder),weights(other)
    assert a.keys()==b.keys() and [m[:2] for m in losses(folder)]==[m[:2] for m in losses(other)]
    assert max((x[2]-y[2])/y[2] for x,y in zip(losses(folder), losses(other)))<1e-5
    return max((a[k]-b[k]).abs().max().item() for k in a)

@pytest.mark.parametrize('step,what', few([(5, 'compute_loss'), (8, 'optimizer'), (1, 'compute_loss')]))
def test_memory_runs_out(step, what, base, data, plain, told):
    folder = base/f'memory_{step}'
    run = Troubled(config(folder, data, **exact), quiet=True, trouble=out_of_memory_at(step, 2, what=what))
    run.train()
    assert (run.fitted.per_device_train_batch_size, run.fitted.gradient_accumulation_steps)==(1, 4)
    if step>1: assert f'Resuming from step {step-1}' in run.heard
    assert any('memory ran out; the effective batch stays the same' in h for h in run.heard)
    assert [c['setting'] for c in read_json(run.folder.config)['_changes'][-2:]]==[
        'per_device_train_batch_size', 'gradient_accumulation_steps']
    difference = near(folder, plain)
    assert difference<=1e-6
    told(f'memory runs out at step {step} ({what})',
         f'1 × 4 rows from step {step-1}, weights within {difference:.0e}', 'the step under way')

def test_a_smaller_pass_is_remembered_by_a_run_that_goes_on(base, data, plain, told):
    folder = base/'remembered'
    place,step,spoil = out_of_memory_at(3, 2)
    run = Troubled(config(folder, data, **exact), quiet=True, trouble=(place, step, spoil))
    own = run.callbacks
    run.callbacks = lambda: [*own(), Trouble(run, 'end', 7, lambda run: run.stop())]
    with pytest.raises(Stopped): run.train()
    again = Troubled(config(folder, data, **exact), quiet=True)
    again.train()
    assert again.fitted.per_device_train_batch_size==1 and 'Resuming from step 7' in again.heard
    assert near(folder, plain)<=1e-6
    told('memory runs out, then Ctrl-C', 'goes on with 1 × 4 rows', 'nothing')

def test_memory_runs_out_with_one_row(base, data, undisturbed, told):
    folder = base/'one_row'
    run = Troubled(config(folder, data, per_device_train_batch_size=1, gradient_accumulation_steps=4), quiet=True,
                   trouble=out_of_memory_at(5, 1, times=9))
    with pytest.raises(SageError, match='out of memory with 1 row .*max_length.*gradient_checkpointing.*load_in_4bit'):
        run.train()
    assert read_json(RunFolder(folder).stopped)['step']==4
    told('memory runs out with one row', 'one line with the remedies; step 4 kept', 'nothing')

def test_three_rows_are_divided_by_three(data, base):
    run = LoRATrainer(config(base/'three', data, per_device_train_batch_size=3), quiet=True)
    assert [c.used for c in resume.smaller_micro_batches(run.config, run.fitted)]==[1, 6]

def test_memory_runs_out_in_an_evaluation(base, data, undisturbed, told, monkeypatch):
    folder,real,calls = base/'evaluation', loop.mean_loss, []
    def fails(model, batches, add=None):
        calls.append(1)
        if len(calls)==2: raise torch.OutOfMemoryError('simulated') # after step 6
        return real(model, batches, add)
    monkeypatch.setattr(loop, 'mean_loss', fails)
    run = Troubled(config(folder, data), quiet=True)
    run.train()
    assert run.evaluation_rows==1 and sum('in a batch (memory ran out' in h for h in run.heard)==1
    assert read_json(run.folder.config)['_evaluation_rows']==1
    assert adapter(folder)==adapter(undisturbed), 'an evaluation is no part of training'
    told('memory runs out in an evaluation', 'evaluated again, 1 row in each pass')

    monkeypatch.setattr(loop, 'mean_loss', lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError('simulated')))
    with pytest.raises(SageError, match='evaluation of a single row'):
        LoRATrainer(config(base/'evaluation_2', data), quiet=True).train()


# Two at a time

def dawdling(folder, data): Troubled(config(folder, data), trouble=('end', 3, lambda run: time.sleep(120))).train()

@needs_posix
def test_two_runs_in_one_folder(base, data, undisturbed, told):
    folder = base/'two'
    first = start(dawdling, folder, data)
    assert wait_until(lambda: reached(folder)>=2, first)
    files = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
    run = LoRATrainer(config(folder, data), quiet=True)
    with pytest.raises(SageError, match=f'is being trained by process {first.pid} on .* since .*another `output_dir`'):
        run.train()
    with pytest.raises(SageError, match='is being trained by'): run.train(fresh=True)
    assert run.model is None and set(files) <= set(folder.rglob('*'))
    first.kill()
    finished(first)
    assert RunFolder(folder).lock.exists(), 'a killed process leaves the file, but not the lock'
    run.train()
    assert same(folder, undisturbed) and not RunFolder(folder).lock.exists()
    told('two runs in one folder', 'the second refuses and names the first; after its kill it runs')

def test_the_lock_is_let_go_of(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError):
            with only_run(tmp_path/'run'): raise RuntimeError
    assert not (tmp_path/'run').exists()


# Somebody's own error

def test_an_error_in_a_callback_keeps_the_last_step(base, data, undisturbed, told):
    folder = base/'own_error'
    def fails(run): raise RuntimeError('a mistake in a callback')
    with pytest.raises(RuntimeError, match='a mistake'):
        Troubled(config(folder, data), quiet=True, trouble=('pass', 5, fails)).train()
    assert last_checkpoint(RunFolder(folder).checkpoints).name=='checkpoint-4' and RunFolder(folder).state=='started'
    LoRATrainer(config(folder, data), quiet=True).train()
    assert same(folder, undisturbed)
    told('an error in a callback', 'raised as it is; from step 4', 'the step under way')

def test_a_merged_model_of_a_stopped_run_goes_when_the_run_goes_on(base, data, undisturbed):
    folder = base/'stale'
    with pytest.raises(Stopped):
        Troubled(config(folder, data), quiet=True, trouble=('end', 5, lambda run: run.stop())).train()
    (RunFolder(folder).merged_model).mkdir()
    (RunFolder(folder).merged_model/'config.json').write_text('{}')
    run = Troubled(config(folder, data), quiet=True)
    run.train()
    assert any('earlier adapter' in h for h in run.heard) and RunFolder(folder).state=='trained'
    (RunFolder(folder).merged_model).mkdir()
    (RunFolder(folder).merged_model/'config.json').write_text('{}')
    LoRATrainer(config(folder, data), quiet=True).train() # nothing left to do
    assert RunFolder(folder).state=='merged'
