"The chat of the command line in a real terminal: streaming, its commands, Ctrl-C, a conversation that grows too long"
import json
import os
import re
import select
import shutil
import sys
import time
from pathlib import Path

import pytest

pty = pytest.importorskip('pty')
pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs a pseudo terminal')

from safetensors.torch import load_file, save_file

from quick import Forked, two_layers
from sage_finetune.cli import main
from sage_finetune.config import resolve_model, TrainingConfig
from sage_finetune.data import create_sample_data
from sage_finetune.inference.generate import answers, base_of, load_adapter, load_for_chat
from sage_finetune.inference.merging import merge_run
from sage_finetune.trainer import LoRATrainer


class Terminal:
    "A forked process with a terminal of its own, typed into and read from"
    def __init__(self, *args, **env):
        program = sys.executable if args[0]=='-c' else 'sage-finetune'
        self.text,(self.fd,theirs) = '',pty.openpty()
        env = os.environ | dict(TERM='dumb', COLUMNS='200', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore') | env
        self.process = Forked([program, *args], env=env, stdin=theirs, stdout=theirs, stderr=theirs,
                              start_new_session=True)
        os.close(theirs)

    def until(self, wanted, seconds=60):
        "What is read up to a text or a pattern, which is taken too"
        pattern,end = re.compile(wanted),time.monotonic()+seconds
        while not (m := pattern.search(self.text)):
            assert time.monotonic()<end, f'{wanted!r} did not come; there was {self.text[-500:]!r}'
            if select.select([self.fd], [], [], 0.2)[0]:
                try: new = os.read(self.fd, 65536)
                except OSError: new = b''
                assert new, f'it ended before {wanted!r} came, with {self.text[-1500:]!r}'
                self.text += new.decode('utf-8', 'replace').replace('\r\n', '\n')
        before,self.found,self.text = self.text[:m.start()],m[0],self.text[m.end():]
        return before

    def type(self, text): os.write(self.fd, text.encode())

    def ask(self, line):
        "Type a line and give what is written up to the next prompt"
        self.type(line+'\n')
        self.until(re.escape(line)+'\n')
        return self.until(r'(?m)^> ')

    def interrupt(self, wanted):
        "Press Ctrl-C until a text comes; between writing a prompt and waiting at it, Python may miss one"
        for _ in range(10):
            self.type('\x03')
            try: return self.until(wanted, 5)
            except AssertionError: pass
        raise AssertionError(f'{wanted!r} did not come')

    def alive(self): return self.process.poll() is None

    def status(self, seconds=20):
        "Exit status, once it ends; what it wrote until then is in `text`"
        end = time.monotonic()+seconds
        while time.monotonic()<end:
            if select.select([self.fd], [], [], 0.05)[0]:
                try: self.text += os.read(self.fd, 65536).decode('utf-8', 'replace')
                except OSError: pass
            if not self.alive(): return self.process.returncode
        raise AssertionError('it did not end')

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run that has learned the form of an answer"
    folder = tmp_path_factory.mktemp('chat')
    data = create_sample_data(folder/'sums.json', 'qa', num_samples=60)
    config = TrainingConfig(model_name=two_layers, data_path=data, output_dir=folder/'run', max_steps=30,
                            per_device_train_batch_size=16, gradient_accumulation_steps=1,
                            learning_rate=5e-3, report_to='none')
    LoRATrainer(config, quiet=True).train()
    return config.output_dir


@pytest.fixture
def terminal(request):
    opened = []
    def start(*args, **env):
        opened.append(Terminal(*args, **env))
        opened[-1].until(r'(?m)^> ')
        return opened[-1]
    yield start
    for t in opened: t.close()


question = 'What is 2 plus 4?'


def test_a_conversation(run, terminal, tmp_path):
    model,tok = load_adapter(run/'lora_weights')
    tuned = answers(model, tok, [question], max_new_tokens=24)[0].text
    with base_of(model): plain = answers(model, tok, [question], max_new_tokens=24)[0].text
    t = terminal('chat', run, '--max-new-tokens', '24')
    assert t.ask(question)=='\n'.join([tuned, ''])
    said = t.ask('/compare').split('\n')
    assert said[-2]==f'tuned: {tuned}' and '\n'.join(said[:-2])==f'base: {plain}' and plain!=tuned
    assert (t.ask('/cmopare')=='unknown command /cmopare; there are /system /reset /temp /compare /image /save '
            '/help /exit /why\n')
    assert t.ask('/system You add numbers.')=='system message: You add numbers.\n'
    assert t.ask('/temp x').startswith('/temp needs a number') and t.ask('/temp 0')=='temperature: 0\n'
    assert t.ask(f'/save {tmp_path}/talk.json').startswith('3 messages in ')
    assert json.loads((tmp_path/'talk.json').read_text())==[
        dict(messages=[dict(role='system', content='You add numbers.'), dict(role='user', content=question),
                       dict(role='assistant', content=tuned)])]
    assert t.ask('/reset')=='forgotten\n' and t.ask('/system -')=='system message: none\n'
    assert t.ask(question).strip()==tuned
    assert '/compare' in t.ask('/help')
    why = t.ask('/why')
    assert 'These rows pushed it most' in why and 'from checkpoints 30' in why, why
    t.type('/exit\n')
    assert t.status()==0, t.text


def test_ctrl_c_stops_an_answer_and_a_long_conversation_loses_its_oldest_turns(terminal, tmp_path):
    endless = Path(shutil.copytree(resolve_model('sage-tiny'), tmp_path/'endless'))
    weights = load_file(endless/'model.safetensors')
    weights['model.embed_tokens.weight'][2] = 0 # the end of turn never is the likeliest token
    save_file(weights, endless/'model.safetensors', metadata=dict(format='pt'))
    t = terminal('-c', f'from sage_finetune.merge_chat import chat, load_for_chat; '
                 f'chat(*load_for_chat({str(endless)!r}), max_new_tokens=1500)')
    for _ in range(2):
        t.type(question+'\n')
        t.until(re.escape(question)+'\n')
        t.until(r'\S{3}', 20) # it streams
        t.type('\x03')
        t.until('…\n', 60)
        t.until(r'(?m)^> ', 20)
        assert t.alive()
    t.interrupt(r'\(/exit or Ctrl-D ends\)\n> ') # at the prompt
    words = ' '.join(['one']*600) # the model takes 2,048 tokens
    shown = []
    for i in range(3):
        t.type(f'{words} {i}\n')
        t.until(f'one {i}\n')
        shown.append(t.until(r'\S{3}')+t.found)
        t.type('\x03')
        shown[-1] += t.until(r'…\n> ')+t.found
    assert [bool(re.search(r'\(\d of \d messages are left out: the model takes 2,048 tokens\)', w))
            for w in shown]==[False, False, True], shown
    t.type('你好'*500+'\n')
    t.until('error: the question has') # a terminal may drop a part of so long an echo
    t.until(r'\n> ')
    assert 'there is no base to compare with' in t.ask('/compare what?')
    t.type('\x04')
    assert t.status()==0, t.text


def test_a_fault_ends_it_with_one_line(run, tmp_path, capsys):
    other = Path(shutil.copytree(run, tmp_path/'run'))
    template = other/'lora_weights'/'chat_template.jinja'
    template.write_text(template.read_text().replace('assistant', 'model'))
    assert main(['chat', str(other)])==1
    assert re.fullmatch('error: .*the chat template has changed.*\n', capsys.readouterr().err)


def test_merged_it_says_the_same(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path/'run'))
    report = merge_run(other, rows=2)
    ours,theirs = (answers(*load_for_chat(p), [question], max_new_tokens=24)[0] for p in (run, other))
    assert ours==theirs and report.same==report.asked
