"""A real kernel and a page without a browser, for tests: it keeps every widget the kernel makes, clicks, types, and
reads what the outputs of each cell are

The kernel is that of a Python of choice, so the same tests run with whatever ipykernel and ipywidgets are installed.
`colab_python` is one with the versions that Google Colab has.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path
from queue import Empty

from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager

ROOT = Path(__file__).parents[2]
# as in Colab's image of 2026-08-19; libraries that compute come from the environment of the tests
OF_COLAB = 'ipywidgets==7.7.1', 'ipykernel==6.17.1', 'ipython==7.34.0', 'jupyter_client==7.4.9', 'traitlets==5.7.1'
VIEW = 'application/vnd.jupyter.widget-view+json'


def colab_python(folder):
    "A Python with Colab's versions: that of SAGE_COLAB_PYTHON, else one made in a folder; None without a network"
    if given := os.environ.get('SAGE_COLAB_PYTHON'): return given
    python = Path(folder)/'bin'/'python'
    if python.exists(): return str(python)
    subprocess.run([sys.executable, '-m', 'venv', str(folder)], check=True)
    install = [python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *OF_COLAB]
    if subprocess.run(install, capture_output=True, timeout=500).returncode: return None
    shared = [p for p in sys.path if p.endswith('site-packages')]
    own = next(Path(folder).glob('lib/python*/site-packages'))
    (own/'zz_shared.pth').write_text('\n'.join(shared)+'\n') # behind its own packages
    return str(python)


class Page:
    "A kernel, and what a page would have of it"
    def __init__(self, folder, python=sys.executable, **env):
        spec = Path(folder)/'kernels'/'tested'
        spec.mkdir(parents=True, exist_ok=True)
        argv = [str(python), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
        (spec/'kernel.json').write_text(json.dumps(dict(argv=argv, display_name='tested', language='python')))
        specs = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
        self.manager = KernelManager(kernel_name='tested', kernel_spec_manager=specs)
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', **env}
        self.manager.start_kernel(env=env, cwd=str(folder))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        # widgets {id: state}; outputs {id of a request: list}; places of outputs that are replaced {id: [output]}
        self.widgets,self.outputs,self.places,self.replies,self.idle,self.sent = {},{},{},{},set(),set()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def kill(self):
        "As a machine that is taken back: nothing is said, nothing is saved"
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    @property
    def pid(self): return self.manager.provisioner.process.pid

    def send(self, code):
        cell = self.client.execute(code)
        self.sent.add(cell)
        return cell

    def interrupt(self):
        "Break off the cells that have not ended"
        if not self.manager.is_alive() or {*self.sent}<={*self.replies}: return
        self.manager.interrupt_kernel()
        self.until(lambda: {*self.sent}<={*self.replies}, 30, 'the cells that were broken off')

    def ended(self, cell):
        "Whether a cell has returned, and all that it showed is here"
        return cell in self.replies and cell in self.idle

    def run(self, code, seconds=120):
        "Run a cell to its end; its outputs. What is raised in it is raised here"
        cell = self.send(code)
        self.until(lambda: self.ended(cell), seconds, code)
        reply = self.replies[cell]
        if reply['status']!='ok': raise RuntimeError(f"{reply.get('ename')}: {reply.get('evalue')}\n{self.text(cell)}")
        return cell

    def text(self, cell):
        "All that stands in the outputs of a cell, without their tags of HTML"
        parts = [d.get('text/html') or d.get('text/plain', '') for d in map(self._data, self.outputs.get(cell, []))]
        for m in [d[VIEW]['model_id'] for d in map(self._data, self.outputs.get(cell, [])) if VIEW in d]:
            parts += [w.get('value', '') for w in self.below(m) if w['_model_name']=='HTMLModel']
        return unescape(re.sub('<[^>]*>', ' ', '\n'.join(map(str, parts))))

    def _data(self, output): return output.get('data') or {'text/plain': output.get('text') or output.get('evalue', '')}

    def below(self, model):
        "A widget and all that are in it"
        state = self.widgets.get(model)
        if state is None: return []
        inside = [c.removeprefix('IPY_MODEL_') for c in state.get('children', [])]
        return [state, *(w for c in inside for w in self.below(c))]

    def until(self, true, seconds=120, what=''):
        "Read messages until something is so"
        end = time.monotonic()+seconds
        while not true():
            assert time.monotonic()<end, f'{what}: it did not come about\n'+'\n'.join(map(self.text, self.outputs))
            assert self.manager.is_alive(), 'the kernel has died'
            self.read()

    def rest(self, seconds):
        "Read what comes for a while"
        end = time.monotonic()+seconds
        while time.monotonic()<end: self.read()

    def read(self):
        try: self._take(self.client.get_iopub_msg(timeout=.05))
        except Empty: pass
        try:
            while True:
                reply = self.client.get_shell_msg(timeout=.001)
                self.replies[reply['parent_header']['msg_id']] = reply['content']
        except Empty: pass

    def _take(self, message):
        kind,content = message['msg_type'],message['content']
        parent = message['parent_header'].get('msg_id')
        if kind=='comm_open' and content['target_name']=='jupyter.widget':
            self.widgets[content['comm_id']] = content['data']['state']
        elif kind=='comm_msg' and content['comm_id'] in self.widgets and content['data'].get('method')=='update':
            self.widgets[content['comm_id']].update(content['data']['state'])
        elif kind=='comm_close': self.widgets.pop(content['comm_id'], None)
        elif kind=='status' and content['execution_state']=='idle': self.idle.add(parent)
        elif kind in ('display_data', 'execute_result', 'stream', 'error'):
            self.outputs.setdefault(parent, []).append(content)
            if place := content.get('transient', {}).get('display_id'): self.places[place] = content
        elif kind=='update_display_data': self.places[content['transient']['display_id']]['data'] = content['data']

    def find(self, **wanted):
        "The id of the newest widget whose state is so"
        is_it = lambda state: all(state.get(k)==v for k,v in wanted.items())
        return next((i for i,state in reversed([*self.widgets.items()]) if is_it(state)), None)

    def tell(self, widget, **data):
        "A message to a widget, as its view sends it; answered when the kernel is idle again"
        message = self.client.session.msg('comm_msg', dict(comm_id=widget, data=data))
        self.client.shell_channel.send(message)
        return message['header']['msg_id']

    def press(self, name):
        self.until(lambda: self.find(description=name), what=f'no button {name!r}')
        return self.tell(self.find(description=name), method='custom', content=dict(event='click'))

    def enter(self, hint, text):
        "Type into the box with this hint, and press Enter"
        box = self.find(placeholder=hint)
        self.tell(box, method='update', state=dict(value=text), buffer_paths=[])
        return self.tell(box, method='custom', content=dict(event='submit'))
