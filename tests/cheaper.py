"""What libraries do again and again in a suite, and need not: nothing of what they give is another

Imported by `conftest.py`, and by the process that others are forked from.
"""
import gc
import hashlib
import json
import os
import re
import shutil
import tempfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from unittest import mock

import jinja2
from PIL import Image


def _once_for_each_text():
    "A template is compiled once: peft compiles that of its model card again for every checkpoint"
    compile_,known = jinja2.Environment.compile, {}
    def compiled(self, source, *args, **more):
        if not isinstance(source, str): return compile_(self, source, *args, **more)
        key = id(self),source,args,tuple(more.items())
        if key not in known: known[key] = self,compile_(self, source, *args, **more)
        return known[key][1]
    jinja2.Environment.compile = compiled


def _larger_files():
    "The same pixels in a larger PNG: matplotlib's curves take half of their time to be made small"
    save = Image.Image.save
    def quick(self, file, format=None, **more):
        return save(self, file, format, **(dict(compress_level=1) | more if format=='png' else more))
    Image.Image.save = quick


def without_curve():
    """A context in which a run leaves a small file for its curve of losses, which takes a tenth of a second to draw;
    a figure that is asked for by another name is drawn
    """
    from matplotlib.figure import Figure
    draw = Figure.savefig
    def quick(self, file, **more):
        if 'loss.png' not in Path(str(file)).name: return draw(self, file, **more)
        Path(file).write_bytes(b'curve')
    return mock.patch.object(Figure, 'savefig', quick)


def _kept_run(config):
    "Where a run of such settings and rows is kept, wherever it and its rows lie"
    settings = {k: v for k,v in config.to_dict().items() if k not in ('data_path', 'output_dir')}
    asked = json.dumps(settings, sort_keys=True, default=str).encode() + Path(config.data_path).read_bytes()
    return Path(os.environ['SAGE_TESTS'])/'runs'/hashlib.sha256(asked).hexdigest()[:16]


def first_run_once():
    """A context in which the first run of a lesson is trained once for all lessons that begin with such a run: the
    others find a copy of its folder, and read the finished run back
    """
    from sage_finetune.trainer import LoRATrainer
    train,begun = LoRATrainer.train,[]
    def once(self, fresh=False):
        if begun: return train(self, fresh)
        begun.append(kept := _kept_run(self.config))
        if kept.is_dir(): shutil.copytree(kept, self.folder.path)
        result = train(self, fresh)
        if not kept.is_dir():
            kept.parent.mkdir(exist_ok=True)
            whole = Path(shutil.copytree(self.folder.path, tempfile.mkdtemp(dir=kept.parent), dirs_exist_ok=True))
            try: whole.rename(kept)
            except OSError: shutil.rmtree(whole) # another worker was first
        return result
    return mock.patch.object(LoRATrainer, 'train', once)


def _rarer_collections():
    "Thousands of objects come and go with every step: cycles among them are looked for every ten steps, not in each"
    gc.set_threshold(50_000, 20, 20)


def _every_expression_is_kept():
    "More expressions than Python keeps are compiled by the families of models and by the package"
    re._MAXCACHE = 10**5


def _compiled_once():
    "A module of the package that is imported anew is not compiled anew, also where Python may write no bytecode"
    get_code,known = SourceFileLoader.get_code,{}
    def kept(self, name):
        if name.partition('.')[0]!='sage_finetune': return get_code(self, name)
        key = self.path,os.stat(self.path).st_mtime_ns
        if key not in known: known[key] = get_code(self, name)
        return known[key]
    SourceFileLoader.get_code = kept


def _nothing_waits_for_the_disk():
    "Tests kill processes, which loses nothing that was written; only a power cut does"
    os.fsync = lambda descriptor: None


_compiled_once()
_nothing_waits_for_the_disk()
_once_for_each_text()
_larger_files()
_rarer_collections()
_every_expression_is_kept()
