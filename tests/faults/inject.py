"""One fault in a process: its n-th write below a folder fails, or is where the process dies

Python says through its audit hooks what it is about to open, move, make or remove; the writers of libraries that do not
go through Python (safetensors, torch, tokenizers, pyarrow) are asked beforehand. From the n-th such moment on,

- `denied`: this one is not permitted;
- `full`: it and every later one finds the disk full;
- `half`: no file can grow beyond a few bytes, so that what is written is cut short;
- `dies`: the process is gone, as after `kill -9`;
- `clock`: the clock stands a day earlier;
- `SIGINT`, `SIGTERM`, `SIGHUP`: the process is asked to stop, once.
"""
import errno
import os
import resource
import signal
import sys
import time
from pathlib import Path

modes = 'denied', 'full', 'half', 'dies', 'clock', 'SIGINT', 'SIGTERM', 'SIGHUP'
_moves = 'os.rename', 'os.mkdir', 'os.rmdir', 'os.remove', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod'


def turn_back():
    now,exact = time.time,time.time_ns
    time.time = lambda: now()-86_400
    time.time_ns = lambda: exact()-86_400*10**9


class Injector:
    "Counts the moments of writing below a folder, and plants a fault in the n-th"
    def __init__(self, folder, mode=None, at=0):
        self.folder,self.mode,self.at,self.seen = os.path.realpath(folder)+os.sep, mode, at, 0

    def begin(self):
        sys.addaudithook(self.hear)
        import pyarrow as pa, safetensors.numpy, safetensors.torch, tokenizers, torch
        for owner in (safetensors.torch, safetensors.numpy): self.ask_before(owner, 'serialize_file')
        for owner,name in ((torch, 'save'), (pa, 'OSFile')): self.ask_before(owner, name)
        return self

    def ask_before(self, owner, name):
        real = getattr(owner, name)
        def asked(*args, **kwargs):
            for path in (a for a in (*args, *kwargs.values()) if isinstance(a, (str, Path))): self.moment(path)
            return real(*args, **kwargs)
        setattr(owner, name, asked)

    def hear(self, event, args):
        if event=='open':
            path,mode,flags = args
            writes = (set(mode or '') & set('wax+')) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes: self.moment(path)
        elif event in _moves: self.moment(args[0])

    def moment(self, path):
        if isinstance(path, int): return
        try: path = os.path.abspath(os.fsdecode(path))
        except TypeError: return
        if not path.startswith(self.folder): return
        self.seen += 1
        if self.mode is None or self.seen<self.at: return
        if self.mode=='dies': os._exit(137)
        if self.mode=='clock' and self.seen==self.at: turn_back()
        if self.mode.startswith('SIG') and self.seen==self.at: signal.raise_signal(getattr(signal, self.mode))
        if self.mode=='half': return resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        if self.mode=='full': raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.mode=='denied' and self.seen==self.at: raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
