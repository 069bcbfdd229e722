"""A person at JupyterLab, for tests: a server of its own, a headless Chromium, and what such a person does and
sees.

Everything stays on this machine: a request to any other host is refused and remembered (`Page.strangers`).
Settings, workspaces and kernels are thrown away at the end.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

browser_names = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
browser_flags = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-quic', '--no-first-run',
                 '--disable-background-networking',
                 '--disable-component-update', '--disable-sync']
lab_settings = {
    '@jupyterlab/docmanager-extension/plugin': {'autosave': False},
    '@jupyterlab/apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
    # every cell is in the page, also one that is out of sight
    '@jupyterlab/notebook-extension/tracker': {'windowingMode': 'none'},
}


def missing()->str|None:
    "What is not installed that these tests need, in one line"
    from importlib.util import find_spec
    lacking = [name for name in ('playwright', 'jupyterlab', 'ipywidgets', 'nbconvert') if find_spec(name) is None]
    if lacking: return f"not installed: {', '.join(lacking)} (make test-browser installs it)"
    return (None if browser() else 'no Chromium: install the package `chromium` of the system (make '
            'test-browser says how)')


def browser()->str|None:
    "The Chromium to use: that of SAGE_CHROMIUM, of the system, or the one playwright brought"
    found = os.environ.get('SAGE_CHROMIUM') or next(filter(None, map(shutil.which, browser_names)), None)
    if found: return found
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play: own = play.chromium.executable_path
    return own if Path(own).is_file() else None


def notebook(path, *cells):
    "Write a notebook of code cells"
    import nbformat
    new = nbformat.v4.new_notebook(
        metadata=dict(kernelspec=dict(display_name='Python 3', language='python', name='python3')))
    new.cells = [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(new, path)
    return path


def _free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def server(root, scratch, kernels=True):
    """JupyterLab over the folder `root`; its address. Its scratch folder knows which notebooks are trusted: in a
    new one none is
    """
    port,scratch,log = _free_port(),Path(scratch),Path(scratch)/'lab.log'
    for name,value in lab_settings.items():
        file = scratch/'settings'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip', '127.0.0.1', '--port',
               str(port), '--ServerApp.port_retries=0', '--IdentityProvider.token=',
               '--ServerApp.password=', '--ServerApp.root_dir', str(root), '--LabApp.expose_app_in_browser=True',
               '--LabApp.news_url=', '--LabApp.user_settings_dir', str(scratch/'settings'),
               '--LabApp.workspaces_dir', str(scratch/'workspaces'),
               *([] if kernels else ['--KernelSpecManager.ensure_native_kernel=False',
                                     '--KernelSpecManager.allowed_kernelspecs=none'])]
    env = {**os.environ, 'JUPYTER_CONFIG_DIR': str(scratch/'config'), 'JUPYTER_RUNTIME_DIR': str(scratch/'runtime'),
           'JUPYTER_DATA_DIR': str(scratch/'data'), 'HOME': str(scratch), 'OMP_NUM_THREADS': '1',
           # the first cell of a tutorial installs what is installed
           'PIP_NO_INDEX': '1', 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    process = subprocess.Popen(command, stdout=log.open('w'), stderr=subprocess.STDOUT, start_new_session=True, env=env)
    try:
        _wait_for(f'http://127.0.0.1:{port}', process, log)
        yield f'http://127.0.0.1:{port}'
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)


def _wait_for(address, process, log, seconds=90):
    end = time.monotonic()+seconds
    while time.monotonic()<end and process.poll() is None:
        try:
            urllib.request.urlopen(f'{address}/api/status', timeout=2).read()
            return
        except OSError: time.sleep(.2)
    raise RuntimeError(f'JupyterLab did not start:\n{log.read_text()[-3000:]}')


@contextmanager
def person(size=(1280, 1500)):
    "A browser; a function that opens a notebook at an address gives a `Page`"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser(), args=browser_flags)
        new_page = lambda: chromium.new_context(viewport=dict(width=size[0], height=size[1])).new_page()
        def opens(address, name, run=True, dark=False):
            "A page; `run` says which cells run: all (True), none (None), or none and no kernel (False)"
            return Page(new_page(), address, name, run, dark)
        opens.empty = new_page
        try: yield opens
        finally: chromium.close()


_idle = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
_begun = r"() => [...document.querySelectorAll('.jp-InputPrompt')].some(e => /\[(\*|\d+)\]/.test(e.textContent))"
_finished = ("() => ![...document.querySelectorAll('.jp-Notebook .jp-InputPrompt')].some(e => "
             "e.textContent.includes('*'))")
_faults = """() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells.flatMap((c, i) =>
  (c.outputs || []).filter(o => o.output_type === 'error').map(o => `cell ${i}: ${o.ename}: ${o.evalue}`))"""
_where = ("(text) => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells.findIndex(c => "
          "[c.source].flat().join('').includes(text))")
_run_cells = """([first, last]) => { const book = window.jupyterapp.shell.currentWidget.content;
  book.deselectAll(); book.activeCellIndex = first; if (last > first) book.extendContiguousSelectionTo(last);
  return window.jupyterapp.commands.execute('notebook:run-cell') && null }"""
_run_cell = """([at, code]) => { const book = window.jupyterapp.shell.currentWidget.content;
  book.model.sharedModel.insertCell(at, {cell_type: 'code', source: code}); book.activeCellIndex = at;
  return window.jupyterapp.commands.execute('notebook:run-cell') }"""


class Page:
    "A notebook that somebody has open"
    def __init__(self, page, address, name, run, dark):
        self.page,self.strangers,self.wrong = page,[],[]
        page.route('**/*', self._gate)
        page.on('pageerror', lambda e: self.wrong.append(str(e)))
        page.goto(f'{address}/lab/tree/{name}?reset')
        page.wait_for_selector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell', timeout=90_000)
        page.evaluate("() => { const s = window.jupyterapp.shell; s.collapseLeft(); s.collapseRight() }")
        if dark: self.theme('Dark')
        if run is False: return self.no_kernel()
        page.wait_for_function(_idle, timeout=90_000)
        if not run: return
        page.locator('.lm-MenuBar-itemLabel', has_text=re.compile('^Run$')).click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        page.wait_for_function(_begun, timeout=30_000)

    def _gate(self, route):
        url = route.request.url
        if re.match(r'(https?|wss?)://127\.0\.0\.1[:/]', url) or url.startswith(('data:', 'blob:', 'file:')):
            return route.continue_()
        self.strangers.append(url)
        route.abort()

    def no_kernel(self):
        "Answer the question for a kernel, if it is asked, with none"
        self.page.wait_for_timeout(3000)
        for name in ('No Kernel', 'Cancel'):
            button = self.page.locator('.jp-Dialog button', has_text=name)
            if button.count():
                button.first.click()
                return

    def theme(self, name):
        self.page.evaluate(f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: "
                           f"'JupyterLab {name}'}})")
        self.page.wait_for_timeout(1500)
    def faults(self): return self.page.evaluate(_faults)
    def finished(self, seconds=120):
        self.page.wait_for_function(_finished, timeout=1000*seconds)
        return self

    def at(self, text):
        "The place of the first cell whose source holds a text"
        place = self.page.evaluate(_where, text)
        if place<0: raise ValueError(f'no cell holds {text!r}')
        return place
    def source(self, i):
        return self.page.evaluate(
            "i => [window.jupyterapp.shell.currentWidget.content.model.toJSON().cells[i].source].flat().join('')", i)
    def run_cells(self, first, last):
        "Select cells and run them, as somebody with a hand on the shift key does"
        self.page.evaluate(_run_cells, [first, last])
    def cell(self, i): return self.page.locator('.jp-Notebook .jp-Cell').nth(i)
    def shown(self, i): return self.cell(i).locator('.jp-Cell-outputArea').inner_text()
    def see(self, pattern, cell=None, seconds=60):
        """Wait until a text is to be seen in the outputs of a cell (or of any); its match. What a style hides is
        not seen
        """
        place = (self.page.locator('.jp-Notebook') if cell is None else self.cell(cell)).locator('.jp-Cell-outputArea')
        end = time.monotonic()+seconds
        while not (found := next(filter(None, (re.search(pattern, text) for text in place.all_inner_texts())), None)):
            assert (time.monotonic()<end), f'{pattern!r} is not to be seen in:\n'+'\n'.join(
                place.all_inner_texts())[-3000:]
            self.page.wait_for_timeout(100)
        return found

    def settled(self, cell, seconds=60):
        "Wait until a cell shows one picture and no widget any more"
        from playwright.sync_api import expect
        expect(self.cell(cell).locator('.jupyter-widgets')).to_have_count(0, timeout=1000*seconds)
        expect(self.cell(cell).locator('.jp-Cell-outputArea img')).to_have_count(1, timeout=1000*seconds)

    def press(self, name, seconds=30):
        self.page.locator('.jp-Notebook button.jupyter-button:visible', has_text=name).first.click(timeout=1000*seconds)
    def button(self, name): return self.page.locator('.jp-Notebook button.jupyter-button:visible', has_text=name).first
    def enter(self, text, hint=''):
        "Type into the box with this hint, and press Enter"
        box = self.page.get_by_placeholder(hint).first
        box.click()
        box.fill(text)
        box.press('Enter')
    def run(self, code, at=None):
        "Put a cell at the end (or at a place) and run it; its place"
        at = self.page.locator('.jp-Notebook .jp-Cell').count() if at is None else at
        self.page.evaluate(_run_cell, [at, code])
        return at
    def fits(self, cell):
        "Whether nothing in the outputs of a cell is wider than they are"
        return self.cell(cell).locator('.jp-Cell-outputArea').evaluate('e => e.scrollWidth <= e.clientWidth+1')
    def torn(self, cell):
        "Numbers in the outputs of a cell whose unit stands in the next line"
        return self.cell(cell).locator('.jp-Cell-outputArea').evaluate(r"""area => {
            const found = [], nodes = document.createTreeWalker(area, NodeFilter.SHOW_TEXT)
            while (nodes.nextNode()) {
                const text = nodes.currentNode
                for (const m of text.data.matchAll(/\d[\d.,]* (?:[KMG]iB|s|min|h|nats|tokens\/s|%)(?!\w)/g)) {
                    const range = document.createRange()
                    range.setStart(text, m.index)
                    range.setEnd(text, m.index+m[0].length)
                    if (new Set([...range.getClientRects()].map(r => r.top)).size>1) found.push(m[0])
                }
            }
            return found }""")
    def in_four_ways(self, folder, **cells):
        """Pictures of cells, or of the whole page (None): light and dark, 1280 and 800 wide, as `name_light.png`,
        `name_dark_800.png`
        """
        for width in (800, 1280):
            self.page.set_viewport_size(dict(width=width, height=1500))
            highest = max((self.cell(c).bounding_box()['height'] for c in cells.values() if c is not None), default=0)
            self.page.set_viewport_size(dict(width=width, height=max(1500, int(highest)+300)))
            for theme in ('Dark', 'Light'):
                self.theme(theme)
                for name,cell in cells.items():
                    file = folder/f'{name}_{theme.lower()}{"" if width==1280 else f"_{width}"}.png'
                    self.whole(file) if cell is None else self.picture(file, cell)
            for cell in (c for c in cells.values() if c is not None):
                assert self.fits(cell), f'cell {cell} at {width}'
                assert self.torn(cell)==[], f'cell {cell} at {width}'
    def whole(self, path):
        "The page as it stands in the window, as a PNG of few colours"
        from PIL import Image
        self.page.locator('.jp-NotebookPanel:not(.lm-mod-hidden)').screenshot(path=str(path), animations='disabled')
        with Image.open(path) as image: image.convert('RGB').quantize(128, dither=0).save(path, optimize=True)
    def leave(self):
        "Close the page and end its kernel"
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget?.sessionContext.shutdown()")
        self.page.context.close()
    def saved(self, path, cell, *words, seconds=60):
        "Save until the outputs of a cell hold these words; the outputs in the file"
        import nbformat
        end = time.monotonic()+seconds
        while True:
            self.save()
            outputs = nbformat.read(path, 4).cells[cell].outputs
            text = '\n'.join(o.data.get('text/plain', '') for o in outputs)
            if all(w in text for w in words): return outputs
            assert time.monotonic()<end, f'{words} are not all in {text}'
    def save(self):
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        self.page.wait_for_timeout(1000)

    def picture(self, path, cell, tallest=None):
        "The outputs of a cell, without the margin, as a PNG of few colours"
        if self.page.locator('.jp-Dialog').count(): self.no_kernel() # a slow machine asks late
        area,window = self.cell(cell).locator('.jp-Cell-outputArea'),self.page.viewport_size
        highest = max(window['height'], int(area.bounding_box()['height'])+300) # nothing is cut off at the top
        self.page.set_viewport_size(dict(width=window['width'], height=highest))
        self.page.mouse.move(0, 0) # a row under the mouse is drawn otherwise
        area.scroll_into_view_if_needed()
        self.page.wait_for_timeout(300)
        margin = area.locator('.jp-OutputArea-output').first.bounding_box()['x']-area.bounding_box()['x']
        area.screenshot(path=str(path), animations='disabled')
        from PIL import Image
        with Image.open(path) as image: whole = image.convert('RGB')
        part = whole.crop((max(0, round(margin)-8), 0, whole.width, min(whole.height, tallest or whole.height)))
        part.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


# A dashboard

def steps(page, cell, most):
    "The step that the dashboard shows"
    found = re.search(rf'([\d,]+) of {most}', page.shown(cell))
    # before the first step it does not know how many there will be
    return int(found[1].replace(',', '')) if found else -1


def beyond(page, cell, most, step, seconds=90):
    "Wait until the dashboard shows a later step, as long as steps are done; which one"
    end,last = time.monotonic()+seconds,-1
    while (now := steps(page, cell, most))<=step:
        if now>last: end,last = time.monotonic()+seconds,now
        assert time.monotonic()<end, f'still at step {now}'
        page.page.wait_for_timeout(200)
    return now
