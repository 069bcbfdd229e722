"""One fault in a process: its n-th write below a folder fails, or is where the process dies

Python says through its audit hooks what it is about to open, move, make or remove; the writers of libraries that do not
go through Python (safetensors, torch, tokenizers, pyarrow) are asked beforehand. From the n-th such moment on,

- `denied`: this one is not permitted;
- `full`: it and every later one finds the disk full;
- `half`: no file can grow beyond a few bytes, so that what is written is cut short;
- `dies`: the process is gone, as after `kill -9`;
- `clock`: the clock stands a day earlier;
- `SIGINT`, `SIGTERM`, `SIGHUP`: the process is asked to stop, once.
- `waits`: the process stands still until it is told to go on; another one may run meanwhile.

`anywhen` is a signal that comes after some milliseconds of computing, wherever the process is then.
"""
import errno
import os
import resource
import signal
import sys
import time
from pathlib import Path

modes = 'denied', 'full', 'half', 'dies', 'clock', 'SIGINT', 'SIGTERM', 'SIGHUP', 'anywhen'
stops = dict(SIGINT=130, SIGTERM=143, SIGHUP=129) # Mode → exit status
_moves = 'os.rename', 'os.mkdir', 'os.rmdir', 'os.remove', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod'
_phases = dict(prepare_data='prepare', evaluate='evaluate', _save_checkpoint='checkpoint', keep_last_step='checkpoint',
               _finish='save')


def turn_back():
    now,exact = time.time,time.time_ns
    time.time = lambda: now()-86_400
    time.time_ns = lambda: exact()-86_400*10**9


def signal_of(at):
    "The signal that comes `anywhen`, at one of its moments"
    return list(stops)[at%len(stops)]


def phase():
    "Which part of a run is at work"
    frame = sys._getframe()
    while frame:
        if name := _phases.get(frame.f_code.co_name): return name
        frame = frame.f_back
    return 'train'


class Injector:
    "Counts the moments of writing below a folder, and plants a fault in the n-th"
    def __init__(self, folder, mode=None, at=0, wait=None):
        self.folder,self.mode,self.at,self.wait = os.path.realpath(folder)+os.sep, mode, at, wait
        self.moments,self.hit = [],None

    def begin(self):
        sys.addaudithook(self.hear)
        os.register_at_fork(after_in_child=self.end) # a server of its own is not counted
        import pyarrow as pa, safetensors.numpy, safetensors.torch, torch
        for owner in (safetensors.torch, safetensors.numpy): self.ask_before(owner, 'serialize_file')
        for owner,name in ((torch, 'save'), (pa, 'OSFile')): self.ask_before(owner, name)
        if self.mode=='anywhen':
            signal.signal(signal.SIGPROF, self.ask_to_stop)
            signal.setitimer(signal.ITIMER_PROF, .003+self.at/1000) # not before the command has begun
        return self

    def end(self):
        self.mode = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def ask_to_stop(self, number, frame):
        if self.mode: signal.raise_signal(getattr(signal, signal_of(self.at)))

    def ask_before(self, owner, name):
        real = getattr(owner, name)
        def asked(*args, **kwargs):
            for path in (*args[:2], *kwargs.values()):
                if isinstance(path, (str, Path)) and path!='wb': self.moment(path)
            return real(*args, **kwargs)
        setattr(owner, name, asked)

    def hear(self, event, args):
        if event=='open':
            path,mode,flags = args
            writes = (set(mode or '') & set('wax+')) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes or self.mode=='waits' and 'cache' in str(path): self.moment(path)
        elif event in _moves: self.moment(args[0])

    def moment(self, path):
        if isinstance(path, int) or self.mode=='anywhen': return
        try: path = os.path.abspath(os.fsdecode(path))
        except TypeError: return
        if not path.startswith(self.folder): return
        if self.mode is None: return self.moments.append((path.removeprefix(self.folder), phase()))
        self.moments.append((path.removeprefix(self.folder), ''))
        n = len(self.moments)
        if n==self.at: self.hit = self.moments[-1][0]
        if n>=self.at: self.plant(path, n==self.at)

    def plant(self, path, first):
        if self.mode=='dies': os._exit(137)
        if self.mode=='half': return resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        if self.mode=='full': raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if not first: return
        if self.mode=='denied': raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        if self.mode=='clock': turn_back()
        if self.mode=='waits': self.wait()
        if self.mode in stops: signal.raise_signal(getattr(signal, self.mode))
