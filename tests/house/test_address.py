"Addresses, badges, install cells and the lines on releases come from settings.ini; and what an install cell does"
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial

import pytest

from layout import ROOT, notebooks, source

spec = importlib.util.spec_from_file_location('address_tool', ROOT/'tools/address.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def stale(): return [path.name for path, text in tool.written() if path.read_text(encoding='utf-8')!=text]


def install_cells(cells):
    return [text for c in cells if c['cell_type']=='code' and re.search(r'pip.{1,6}install', text := source(c))
            and text.startswith('#| eval: false')]


def test_every_address_is_in_step(): assert stale()==[]


def test_every_notebook_installs_in_one_way():
    "One cell, the first of code, made by the tool; nothing is installed in any other way"
    for name, cells in notebooks().items():
        if name.endswith('index'): continue
        expected = tool.install_cell(name, cells, tool.settings()).rstrip('\n')
        assert install_cells(cells)==[expected], name
        code = [source(c) for c in cells if c['cell_type']=='code' and 'default_exp' not in source(c)]
        assert code[0]==expected, name
        code = ''.join(source(c)+'\n' for c in cells if c['cell_type']=='code')
        assert not re.search(r'^\s*[%!]\s*pip', code, re.M), name


def test_a_notebook_gets_what_its_lessons_need():
    ini, cells = tool.settings(), notebooks()
    assert [*tool.needed('tutorials/01_first_run', cells['tutorials/01_first_run'], ini)]==['sage_finetune']
    assert [*tool.needed('04_preference', cells['04_preference'], ini)]==['sage_finetune', 'fastcore', 'trl']
    vision = tool.needed('rows/04_images', cells['rows/04_images'], ini)
    assert vision['PIL'].startswith('pillow>=') and vision['num2words'].startswith('num2words>=')
    assert set(tool.EXTRAS) <= set(cells)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A copy of the project that belongs to somebody else"
    for name in ('nbs', 'settings.ini', *tool.TEXTS):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy2)(ROOT/name, tmp_path/name)
    monkeypatch.setattr(tool, 'ROOT', tmp_path)

    def rewrite(**values):
        text = (tmp_path/'settings.ini').read_text(encoding='utf-8')
        for key, value in values.items(): text = re.sub(rf'^{key} =.*$', f'{key} = {value}', text, flags=re.M)
        (tmp_path/'settings.ini').write_text(text, encoding='utf-8')
        for path, written in [*tool.written()]: path.write_text(written, encoding='utf-8')
        assert stale()==[]
    return tmp_path, rewrite


def test_another_owner_and_branch_stand_everywhere(elsewhere):
    folder, rewrite = elsewhere
    rewrite(user='some-lab', branch='trunk')
    texts = {path: path.read_text(encoding='utf-8') for path, _ in tool.written()}
    owner = re.compile(r'github\.com/(github/)?sage-finetune/|colab\S+/sage-finetune/|sage-finetune\.github\.io')
    left = [path.name for path, text in texts.items() if owner.search(text)]
    assert left==[]
    first = texts[folder/'nbs/tutorials/01_first_run.ipynb']
    assert 'sage-finetune @ https://github.com/some-lab/sage_finetune/archive/refs/heads/trunk.zip' in first
    assert '/github/some-lab/sage_finetune/blob/trunk/nbs/tutorials/01_first_run.ipynb)' in first
    assert 'Repository = "https://github.com/some-lab/sage_finetune"' in texts[folder/'pyproject.toml']
    assert 'Documentation = "https://some-lab.github.io/sage_finetune/"' in texts[folder/'pyproject.toml']
    assert '[Unreleased]: https://github.com/some-lab/sage_finetune/' in texts[folder/'CHANGELOG.md']


def test_no_other_file_names_the_address():
    "The address stands in settings.ini once; what is not generated from there has none"
    owner = tool.settings()['user']
    known = {ROOT/name for name in (*tool.TEXTS, 'README.md', 'README.zh.md', 'settings.ini')}
    for path in sorted(ROOT.glob('*')) + sorted((ROOT/'.github').rglob('*.yml')) + sorted((ROOT/'tools').glob('*')):
        if not path.is_file() or path in known or path.name.startswith('.coverage'): continue
        text = path.read_text(encoding='utf-8')
        assert f'github.com/{owner}/' not in text and f'{owner}.github.io' not in text, path


def test_releases_are_told_as_they_are(elsewhere):
    folder, rewrite = elsewhere
    page = lambda: ''.join(''.join(c['source']) for c in json.loads((folder/'nbs/index.ipynb').read_text())['cells'])
    rewrite(released='')
    assert '**Released: nothing yet.**' in page() and '`pip install sage-finetune`' not in page()
    rewrite(released='0.1.0')
    assert '**Released: 0.1.0** (`pip install sage-finetune`)' in page() and 'nothing yet' not in page()
    changes = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8').replace('## [0.1.0] - not released yet',
                                                                       '## [0.1.0] - 2026-12-01')
    links = tool.change_links(changes, tool.settings()).splitlines()[-2:]
    assert links[0].endswith('/compare/v0.1.0...HEAD') and links[1].endswith('/releases/tag/v0.1.0')


@pytest.fixture
def served(tmp_path):
    "An address on this machine at which a folder's files can be fetched"
    folder = tmp_path/'served'
    folder.mkdir()
    handler = type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *_: None))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def cell_for(address):
    ini = tool.settings()
    cells = notebooks()['tutorials/01_first_run']
    return tool.install_cell('tutorials/01_first_run', cells, ini).replace(tool.archive(ini), address)


def in_shell(python, cell, then, **env):
    "Run a cell as IPython does, outside of the checkout; what it printed"
    code = '\n'.join(['from IPython.core.interactiveshell import InteractiveShell',
                      's = InteractiveShell.instance(colors="NoColor")',
                      f'r = s.run_cell({cell!r})', 'print("ended well:", r.success)', then])
    done = subprocess.run([python, '-c', code], capture_output=True, text=True, env=env, cwd=env['HOME'])
    return re.sub(r'\x1b\[[\d;]*m', '', done.stdout+done.stderr)


def test_where_the_package_is_nothing_is_installed(tmp_path):
    "A working copy is not replaced: pip is not even started"
    told = in_shell(sys.executable, cell_for('http://127.0.0.1:1/none.zip'), 'pass',
                                 PYTHONPATH=str(ROOT), HOME=str(tmp_path))
    assert told.strip()=='ended well: True'


@pytest.fixture
def bare(tmp_path):
    "A Python without the package: it sees the packages installed here (pip and IPython), but not the checkout"
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path/'bare'], check=True)
    python = tmp_path/'bare'/'bin'/'python'
    site = next((tmp_path/'bare'/'lib').glob('python*/site-packages'))
    import IPython
    others = str(IPython.__path__[0]).removesuffix('/IPython')
    (site/'others.pth').write_text(others+'\n')
    return python


def test_a_failing_install_ends_in_one_line(bare, served, tmp_path):
    told = in_shell(bare, cell_for(f'{served[1]}/none.zip'), 'pass', HOME=str(tmp_path), PIP_RETRIES='0')
    lines = [line for line in told.strip().splitlines() if not line.startswith(('WARNING', '[notice]'))]
    assert 'Traceback' not in told and lines[-1]=='ended well: False', told
    assert lines[-2]=="Stopped: pip could not install ['sage_finetune']; its reason is above", told
    assert any('404' in line for line in lines[:-2]), told


def test_the_cells_below_a_failing_install_do_not_run(served, tmp_path, bare):
    "As a notebook runs all its cells: with real messages to a real kernel"
    manager = pytest.importorskip('jupyter_client.manager').KernelManager()
    manager.kernel_spec.argv = [str(bare), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    manager.start_kernel(cwd=str(tmp_path), env=dict(HOME=str(tmp_path), PIP_RETRIES='0', PATH='/usr/bin:/bin'))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        sent = [client.execute(text) for text in (cell_for(f'{served[1]}/none.zip'), 'open("ran", "w").close()')]
        replies, until = {}, time.monotonic()+120
        while not {*sent} <= {*replies} and time.monotonic()<until:
            message = client.get_shell_msg(timeout=120)
            replies[message['parent_header']['msg_id']] = message['content']
        assert replies[sent[0]]['status']=='error' and replies[sent[0]]['ename']=='NotInstalled'
        assert replies[sent[0]]['traceback']==["Stopped: pip could not install ['sage_finetune']; its reason is above"]
        assert replies[sent[1]]['status'] in ('aborted', 'error') and not (tmp_path/'ran').exists()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def pack(folder, to):
    "The committed files as GitHub packs a branch"
    names = subprocess.run(['git', 'ls-files', '-z'], cwd=folder, capture_output=True, text=True, check=True).stdout
    with zipfile.ZipFile(to, 'w') as packed:
        for name in filter(None, names.split('\0')):
            if (folder/name).is_file(): packed.write(folder/name, f'sage_finetune-main/{name}')


@pytest.mark.slow
def test_the_archive_installs_and_is_found_at_once(bare, served, tmp_path):
    "Before any release: the cell installs the repository's archive, and the next cell imports it"
    if not (ROOT/'.git').exists(): pytest.skip('no git here: the archive cannot be packed')
    pack(ROOT, served[0]/'main.zip')
    then = 'r = s.run_cell("import sage_finetune; print(sage_finetune.__version__, sage_finetune.__file__)")'
    told = in_shell(bare, cell_for(f'{served[1]}/main.zip'), then, HOME=str(tmp_path), PIP_NO_DEPS='1',
                                 PIP_DISABLE_PIP_VERSION_CHECK='1')
    if 'setuptools' in told and 'ended well: False' in told: pytest.skip(f'no package registry for setuptools: {told}')
    assert 'ended well: True' in told and f'{tool.settings()["version"]} {tmp_path}/bare/' in told, told
