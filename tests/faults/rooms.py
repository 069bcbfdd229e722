"""A room: a folder with a run in it, and a process that is warm from the beginning and forks for each command

What a command comes to is told from two undisturbed ones: what both wrote alike must be there again after a fault, to
the bit; what they wrote differently (times, say) must be there.
"""
import gc
import json
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from inject import Injector
import quick
from quick import forked, two_layers

_preload = ('rich.console rich.table rich.panel rich.progress typer._adapters typer._click.decorators jinja2.debug '
            'peft.utils.transformers_weight_conversion torch.utils.serialization.config '
            'transformers.models.qwen2.tokenization_qwen2 encodings.latin_1 encodings.utf_8_sig PIL.JpegImagePlugin '
            'numpy.ctypeslib accelerate.utils.memory pandas').split()
_ours = ('trainer merge_chat preference serving.export serving.serve serving.chat_api runs.run runs.verify '
         'ui.monitor ui.inspect ui.adapter_sizes cli').split()


# The warm process

def _warm(room):
    "Import everything, and do once what needs no backward pass: autograd does not survive a fork"
    import importlib
    import re as regular
    os.environ.update(HOME=str(room/'home'), SAGE_CACHE=str(room/'cache'), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1',
                      HF_DATASETS_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', HF_HUB_VERBOSITY='error',
                      TOKENIZERS_PARALLELISM='false', COLUMNS='200')
    os.fsync = lambda descriptor: None # a process that is killed loses nothing that was written
    regular._MAXCACHE = 10_000
    for name in [n for n in sys.modules if n.partition('.')[0]=='sage_finetune']: del sys.modules[name]
    for name in (*_preload, *(f'sage_finetune.{n}' for n in _ours)): importlib.import_module(name)
    import torch
    torch.set_num_threads(1)
    from matplotlib.figure import Figure
    def small(self, file, **more): # the curve of losses takes as long to draw as all steps to train
        if isinstance(file, (str, Path)): return Path(file).write_bytes(b'\x89PNG')
        file.write(b'\x89PNG')
    Figure.savefig = small
    from sage_finetune.inference.generate import answers, load_plain
    model,tokenizer = load_plain(two_layers)[:2]
    list(answers(model, tokenizer, ['Hi?'], max_new_tokens=2))
    from sage_finetune.serving import serve
    quick._inside = True
    quick.fork_servers(serve)
    gc.freeze()


def _command(room, words, mode, at, said, gates):
    "The command line, with a fault in it; writes what was said and its moments"
    multiprocessing_child_of_its_own()
    os.chdir(room)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number==signal.SIGINT else signal.SIG_DFL)
    handle = os.open(said, os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2): os.dup2(handle, number)
    sys.stdout,sys.stderr = (open(n, 'w', closefd=False, encoding='utf-8') for n in (1, 2))
    sys.argv = ['sage-finetune', *words]
    def wait():
        os.write(gates[0], b'.')
        os.read(gates[1], 1)
    from sage_finetune.cli import main
    injector = Injector(room, mode, at, wait).begin()
    before = time.process_time()
    try: status = main()
    except SystemExit as e: status = e.code
    injector.end()
    took = time.process_time()-before
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError): stream.flush()
    note = dict(moments=injector.moments if mode is None else len(injector.moments), hit=injector.hit, cpu=took)
    Path(f'{said}.note').write_text(json.dumps(note))
    os._exit(status if isinstance(status, int) else int(status is not None))


def multiprocessing_child_of_its_own():
    import multiprocessing
    multiprocessing.current_process()._config['daemon'] = False


def _forks(room, orders):
    "Fork for each order; say how it ended"
    try: _warm(room)
    except BaseException:
        import traceback
        orders.send(('failed', traceback.format_exc()))
        raise
    orders.send(('warm', ''))
    ended = {}
    while order := orders.recv():
        if order[0]=='start':
            to_us,from_them = os.pipe()
            from_us,to_them = os.pipe()
            pid = os.fork()
            if not pid:
                code = 70
                try: _command(room, *order[1:], (from_them, from_us))
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    with suppress(Exception): sys.stderr.flush()
                    os._exit(code)
            for end in (from_them, from_us): os.close(end)
            os.set_blocking(to_us, False)
            ended[pid] = [None, to_us, to_them]
            orders.send(pid)
            continue
        pid = order[1]
        if order[0]=='go on':
            with suppress(OSError): os.write(ended[pid][2], b'.')
        if ended[pid][0] is None:
            found,status = os.waitpid(pid, os.WNOHANG)
            if found: ended[pid][0] = os.waitstatus_to_exitcode(status)
        waits = False
        if order[0]=='look':
            with suppress(BlockingIOError, OSError): waits = bool(os.read(ended[pid][1], 1))
        if order[0]=='forget':
            for end in ended.pop(pid)[1:]: os.close(end)
            orders.send(None)
        else: orders.send((ended[pid][0], waits))


class Room:
    "A folder in which commands are given"
    def __init__(self, folder):
        self.path,self.store = folder/'room', folder/'states'
        (self.path/'home').mkdir(parents=True)
        self.store.mkdir()
        self.pipe,theirs = forked.Pipe()
        self.process = forked.Process(target=_forks, args=(self.path, theirs), daemon=True)
        self.process.start()
        said = self.pipe.recv()
        assert said[0]=='warm', said[1]

    def close(self):
        self.pipe.send(None)
        self.process.join()

    def ask(self, *order):
        self.pipe.send(order)
        return self.pipe.recv()

    def keep(self, name): # the room as a state to begin with
        shutil.copytree(self.path, self.store/name, symlinks=True)

    def begin(self, name): # as it was kept; large files, which are never written into, share their bytes
        shutil.rmtree(self.path, ignore_errors=True)
        def linked(source, to):
            os.link(source, to) if os.path.getsize(source)>30_000 else shutil.copy2(source, to)
        shutil.copytree(self.store/name, self.path, symlinks=True, copy_function=linked)

    def start(self, words, mode=None, at=0): return Command(self, words, mode, at)
    def run(self, words, mode=None, at=0, within=240): return self.start(words, mode, at).end(within)


class Command:
    "A command that is at work in a room"
    number = 0
    def __init__(self, room, words, mode=None, at=0):
        Command.number += 1
        self.room,self.words,self.said = room,words,str(room.store/f'said{Command.number}')
        os.mkfifo(self.said) # a pipe, which is written to where no file can be
        self.reader,self.heard,self.answer,self.waits,self.status = None,b'',None,False,None
        self.reader = os.open(self.said, os.O_RDONLY | os.O_NONBLOCK)
        self.pid = room.ask('start', words, mode, at, self.said)

    def look(self):
        "Hear what it says; True when it is over"
        self.status,waits = self.room.ask('look', self.pid)
        self.waits = self.waits or waits
        with suppress(BlockingIOError):
            while new := os.read(self.reader, 2**16): self.heard += new
        if self.answer is None and (url := re.search(rb'is served at (\S+)/v1 .*Ctrl-C stops it', self.heard)):
            self.answer = ''
            self.use(url[1].decode())
        return self.status is not None

    def use(self, url):
        "Ask a server once, then end it"
        asked = json.dumps(dict(model='run', messages=[dict(role='user', content='Hi?')], max_tokens=4)).encode()
        request = urllib.request.Request(f'{url}/v1/chat/completions', asked, {'Content-Type': 'application/json'})
        with suppress(OSError), urllib.request.urlopen(request, timeout=120) as reply:
            self.answer = json.loads(reply.read())['choices'][0]['message']['content']
        with suppress(ProcessLookupError): os.kill(self.pid, signal.SIGTERM)

    def until_it_waits(self, within=240):
        "True when it stands still, False when it is over"
        end = time.monotonic()+within
        while not self.look() and not self.waits:
            assert time.monotonic()<end, f'it hangs: {self.words}'
            time.sleep(.005)
        return self.status is None

    def go_on(self):
        self.waits = False
        self.room.ask('go on', self.pid)

    def end(self, within=240):
        "What came of it; None where it does not end"
        end = time.monotonic()+within
        while not self.look():
            if time.monotonic()>end: return None
            time.sleep(.005)
        self.look()
        os.close(self.reader)
        self.room.ask('forget', self.pid)
        note = Path(f'{self.said}.note')
        known = json.loads(note.read_text()) if note.is_file() else dict(moments=[], hit=None, cpu=0)
        for file in (note, Path(self.said)): file.unlink(missing_ok=True)
        return Came(self.status, self.heard.decode(errors='replace'), self.answer, **known)


class Came:
    "What came of a command"
    def __init__(self, status, said, answer, moments, hit, cpu):
        self.status,self.said,self.answer,self.moments,self.hit,self.cpu = status,said,answer,moments,hit,cpu

    @property
    def last(self): # its last line
        lines = [l for l in re.split(r'[\r\n]', self.said) if l.strip()]
        return lines[-1] if lines else ''


# What lies in a room

def _leaves(value, name=''):
    if isinstance(value, dict): return {k: v for n,x in value.items() for k,v in _leaves(x, f'{name}/{n}').items()}
    if isinstance(value, list): return {k: v for n,x in enumerate(value) for k,v in _leaves(x, f'{name}/{n}').items()}
    return {name: value}

def content(path):
    "What a file holds, value by value where it is JSON"
    data = path.read_bytes()
    with suppress(ValueError, UnicodeDecodeError):
        if path.name=='receipt.json': return _leaves(json.loads(data)['values']) # steps: since the last
        if path.suffix=='.json': return _leaves(json.loads(data))
        if path.suffix=='.jsonl':
            rows = [json.loads(line) for line in data.splitlines()]
            # how long the process took that ended a run; one that finds all steps done took none
            return _leaves([r for r in rows if 'train_runtime' not in r])
    return {'': data}

# What is measured may be the same in two runs by chance; a report says whether its rows were prepared before
_not_compared = {'learned_tokens_per_second', 'tokens_per_second', 'matmul_share', 'memory', 'seconds', 'train_runtime',
                 'train_samples_per_second', 'train_steps_per_second', 'cached'}

def lies_in(folder):
    "{file: {name: value}} of all that is below a folder, but the home of a person and files of TensorBoard"
    files = [p for p in folder.rglob('*') if p.is_file() and 'tfevents' not in p.name
             and p.relative_to(folder).parts[0]!='home']
    return {p.relative_to(folder).as_posix(): content(p) for p in files}

def alike(one, two):
    "What is the same in both: a value that differs is only named"
    differs = object()
    def same(file, name, value):
        sums = file.endswith(('checksums.json', 'COMPLETE')) # of files that hold times
        measured = name.rpartition('/')[2] in _not_compared and not file.endswith('tokenizer.json')
        return value if two[file][name]==value and not sums and not measured else differs
    return {f: {k: same(f, k, v) for k,v in one[f].items() if k in two[f]} for f in one if f in two},differs

class Wanted:
    "What a command comes to, from two undisturbed ones"
    def __init__(self, one, two):
        self.files,self.any = alike(one, two)

    def differs(self, found, only=None):
        "The first thing that is not as it should be; None where all is"
        for file,values in self.files.items():
            if only and not only(file): continue
            if file not in found and self._took_its_place(file, found): continue
            if file not in found: return f'{file} is missing'
            for name,value in values.items():
                if name not in found[file]: return f'{file}: {name} is missing'
                if value is not self.any and found[file][name]!=value:
                    was = '' if isinstance(value, bytes) else f' ({found[file][name]!r}, not {value!r})'
                    return f'{file}: {name} differs{was}'[:300]
        for file in found:
            kept = '/checkpoints/checkpoint-' in file # where it was stopped
            if file in self.files or kept or only and not only(file): continue
            return f'{file} was not there before'

    def _took_its_place(self, file, found):
        "Whether the checkpoint of a file is one too many beside that at which the run was stopped"
        at = file.rpartition('/')[0]
        checkpoint = lambda f: f.rpartition('/')[0]
        other = {checkpoint(f) for f in found if '/checkpoints/checkpoint-' in f}
        return '/checkpoints/checkpoint-' in file and at not in other and other-{checkpoint(f) for f in self.files}
