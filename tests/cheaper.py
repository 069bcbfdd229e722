"""What libraries do again and again in a suite, and need not: nothing of what they give is another

Imported by `conftest.py`, and by the process that others are forked from.
"""
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


_once_for_each_text()
_larger_files()
