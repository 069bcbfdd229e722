"Training beside other work: what must not change, what ends a process, and what is not imported"
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

fcntl,pty,termios = (pytest.importorskip(m, reason='needs terminals and signals as POSIX has them')
                     for m in ('fcntl', 'pty', 'termios'))

from quick import Forked, two_layers
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.ui.live import LiveCallback, LiveRun, read_generations, train_in_terminal
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer

prompts = ['What is 2 plus 4?',
           [dict(role='system', content='Be brief.'), dict(role='user', content='What is 30 plus 1?')]]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return create_sample_data(tmp_path_factory.mktemp('data')/'sums.jsonl', 'qa', num_samples=48)


def config(folder, data, **more):
    settings = dict(model_name=two_layers, data_path=data, output_dir=folder, test_size=0.1, max_steps=6,
                    save_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                    learning_rate=5e-3, logging_steps=2, report_to='none', lora=LoRAConfig(r=4, lora_dropout=0.1))
    return TrainingConfig(**(settings | more))


def quiet(folder, data, **more): return LoRATrainer(config(folder, data, **more), quiet=True)


def adapter(folder): return (RunFolder(folder).lora_weights/'adapter_model.safetensors').read_bytes()


def until(true, seconds=90):
    end = time.monotonic()+seconds
    while not true():
        assert time.monotonic()<end, 'it did not come about'
        time.sleep(.01)


# Looked at and not changed, on every way to train

ways = dict(checkpointing_and_noise=dict(gradient_checkpointing=True, neftune_noise_alpha=5.0),
            packed=dict(packing=True, max_length=128), four_bits=dict(load_in_4bit=True),
            eight_bits_and_the_best=dict(load_in_8bit=True, load_best_model_at_end=True, eval_steps=3))


slow_ways = 'four_bits', 'checkpointing_and_noise', 'packed'

@pytest.mark.parametrize('way', [pytest.param(w, marks=pytest.mark.slow) if w in slow_ways else w for w in ways])
def test_a_watched_run_comes_to_the_same_bits(way, tmp_path, data):
    more = ways[way]
    LoRATrainer(config(tmp_path/'alone', data, **more), quiet=True).train()
    live = LiveRun(LoRATrainer(config(tmp_path/'watched', data, **more), quiet=True), prompts, every=1,
                   max_new_tokens=6).start()
    live.pause()
    until(lambda: live.board.phase=='paused' or not live.running)
    live.chat('Hm?', max_new_tokens=4, temperature=0.9)
    live.talk.max_new_tokens,live.talk.temperature = 4,0.9
    assert live.talk.ask('Hm?', strength=.5).step==live.board.step # its base beside it
    live.go_on()
    assert live.wait().steps==6 and live.board.phase=='done'
    assert live.prompts, [str(n) for n in live.board.notes] # empty where answering failed
    assert adapter(tmp_path/'watched')==adapter(tmp_path/'alone')
    assert [g['step'] for g in read_generations(tmp_path/'watched'/'generations.jsonl')]==[
        s for s in range(7) for _ in prompts]


# What ends a process, and what ends a run

script = '''
import sys, time
from sage_finetune.config import TrainingConfig
from sage_finetune.ui.live import LiveRun
from sage_finetune.trainer import LoRATrainer
if __name__=='__main__':
    live = LiveRun(LoRATrainer(TrainingConfig.load(sys.argv[1]), quiet=True)).start()
    while live.board.step<3: time.sleep(.01)
'''


@pytest.mark.slow
def test_a_script_that_ends_without_waiting_saves_what_was_done(tmp_path, data):
    asked = config(tmp_path/'left', data, max_steps=5000, report_to='none')
    asked.save(tmp_path/'asked.json')
    (tmp_path/'script.py').write_text(script)
    done = subprocess.run([sys.executable, tmp_path/'script.py', tmp_path/'asked.json'], capture_output=True,
                          text=True, timeout=180, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode==0, done.stderr
    assert RunFolder(tmp_path/'left').state=='stopped'
    again = LiveRun(LoRATrainer(asked, quiet=True)).start()
    until(lambda: again.board.phase=='training' and again.board.step>=4)
    steps,held = [s for s,_ in again.board.loss.line],[s for s,_ in again.board.held_out.line]
    assert (steps[0], held[0])==(1, 0), 'what was written down before is on both curves'
    assert steps==sorted({*steps}) and held==sorted({*held}) and held[-1]<=steps[-1]
    again.stop()
    assert again.wait() is None


def test_stop_is_heard_at_any_moment(tmp_path, data):
    for i,moment in enumerate((0, .5, 2)):
        live = LiveRun(quiet(tmp_path/str(i), data, max_steps=5000), prompts, every=1, max_new_tokens=64).start()
        time.sleep(moment)
        live.stop()
        assert live.wait(90) is None and live.board.phase=='stopped', live.board.phase


def test_stop_ends_a_pause_and_a_long_answer(tmp_path, data):
    live = LiveRun(quiet(tmp_path/'run', data, max_steps=5000)).start()
    live.pause()
    until(lambda: live.board.phase=='paused')
    assert [type(c) for c in live.run.trainer.callback_handler.callbacks].count(LiveCallback)==1
    question = live.ask('Tell me everything.', max_new_tokens=100_000)
    time.sleep(.3)
    live.stop()
    assert live.wait(90) is None and live.board.phase=='stopped'
    assert question.done.is_set()


def test_a_question_of_the_talk_that_waits_can_be_taken_back(tmp_path, data):
    "Nobody waits for a slow micro-batch in order to stop what was not begun"
    held = threading.Event()
    class Held(LoRATrainer):
        def prepare_data(self):
            held.wait(60) # nothing is answered before it trains
            super().prepare_data()
    live = LiveRun(Held(config(tmp_path/'run', data, max_steps=5000), quiet=True))
    live.start()
    began = time.monotonic()
    said = live.talk.ask('Are you there?', heard=lambda exchange: False)
    assert (said.stopped, said.base+said.tuned, live._questions)==(True, '', type(live._questions)())
    assert time.monotonic()-began<10 and not held.is_set() and live.talk.exchanges==[said]
    held.set()
    assert 'Are you there? (stopped)' in str(live.board)
    live.stop()
    live.wait(90)


@pytest.mark.slow # one model more
def test_where_the_base_cannot_answer_the_reason_stands_in_its_place(tmp_path, data):
    base = shutil.copytree(two_layers, tmp_path/'base')
    live = LiveRun(quiet(tmp_path/'run', data, model_name=str(base), max_steps=2,
                         lora=LoRAConfig(r=4, init_lora_weights='pissa')))
    live.start().wait()
    (base/'model.safetensors').unlink() # what PiSSA took out of it
    said = live.talk.ask('What is 2 plus 4?')
    assert said.base.startswith('(the model in memory cannot answer as its base: ') and said.tuned and said.step==2


def test_a_second_run_in_the_same_folder_is_refused_and_leaves_the_first(tmp_path, data):
    first = LiveRun(quiet(tmp_path/'run', data, max_steps=5000)).start()
    until(lambda: first.board.step>=1)
    with pytest.raises(Exception, match='is being trained by'):
        LiveRun(quiet(tmp_path/'run', data, max_steps=5000)).start().wait()
    now = first.board.step
    until(lambda: first.board.step>now)
    first.stop()
    first.wait(90)


# Terminal

def test_in_a_terminal_ctrl_c_stops_and_saves(tmp_path, data):
    config(tmp_path/'run', data, max_steps=5000).save(tmp_path/'asked.json')
    (tmp_path/'script.py').write_text('import sys\nfrom sage_finetune.config import TrainingConfig\n'
                                      'from sage_finetune.ui.live import train_in_terminal\n'
                                      'try: train_in_terminal(TrainingConfig.load(sys.argv[1]), ["What is 2 plus '
                                      '4?"])\nexcept KeyboardInterrupt as e: print(e); sys.exit(130)\n')
    ours,theirs = pty.openpty()
    child = Forked([sys.executable, tmp_path/'script.py', tmp_path/'asked.json'], stdin=theirs, stdout=theirs,
                   stderr=theirs, env={**os.environ, 'OMP_NUM_THREADS': '1', 'TERM': 'xterm'})
    os.close(theirs)
    seen = b''
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack('HHHH', 60, 100, 0, 0))
    try:
        while not any(int(n)>=3 for n in re.findall(r'(\d+) of 5,000', seen.decode(errors='replace'))):
            seen += read(ours)
        child.send_signal(signal.SIGINT)
        while some := read(ours): seen += some
        assert child.wait(60)==130
    finally:
        child.kill()
        os.close(ours)
    text = seen.decode(errors='replace')
    assert 'held-out loss' in text and 'Stopped: stopped at step' in text
    assert RunFolder(tmp_path/'run').state=='stopped'


def read(terminal, seconds=90):
    "What a terminal says next; nothing where the program has closed it"
    assert select.select([terminal], [], [], seconds)[0], 'nothing was said'
    try: return os.read(terminal, 65536)
    except OSError: return b''


def test_where_nobody_watches_it_is_an_ordinary_run(tmp_path, data, capfd):
    result = train_in_terminal(config(tmp_path/'run', data))
    assert result.steps==6 and 'held-out loss' not in capfd.readouterr().err


# Nothing that is not used

@pytest.mark.slow # an interpreter of its own
def test_what_shows_is_imported_only_when_something_is_shown():
    "`core.display` lies below the trainer and must bring nothing with it that draws"
    shows = 'ipywidgets', 'matplotlib', 'rich.live'
    # older releases of httpx bring rich, and transformers brings httpx: that is not ours
    code = (f"import sys, transformers; brought = {{*sys.modules}}\n"
            f"import sage_finetune.trainer; print([m for m in {('sage_finetune.ui', 'rich', 'IPython', *shows)} "
            f"if m in {{*sys.modules}}-brought])\n"
            f"import sage_finetune.ui.live; print([m for m in {shows} if m in {{*sys.modules}}-brought])")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split('\n')[:2]==['[]', '[]'], done
