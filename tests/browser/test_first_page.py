"The first minutes of somebody who types `make lab`: the page that opens, its diagram and links, and a run of their own"
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import lab

nbs = Path(__file__).parents[2]/'nbs'


def command_of_lab():
    "What `make lab` runs, without the Python"
    recipe = re.search(r'^lab:.*\n\t(.+)', (nbs.parent/'Makefile').read_text(), re.M)[1]
    assert recipe.startswith('$(BIN)/python -m jupyterlab ')
    return recipe.split()[1:]


def test_make_lab_opens_the_first_page(tmp_path):
    port = lab._free_port()
    words = [sys.executable, *command_of_lab(), '--no-browser', '--allow-root', '--ip', '127.0.0.1', '--port',
             str(port), '--IdentityProvider.token=', '--ServerApp.password=']
    env = {**os.environ, **{f'JUPYTER_{n.upper()}_DIR': str(tmp_path/n) for n in ('config', 'runtime', 'data')}}
    log = tmp_path/'lab.log'
    process = subprocess.Popen(words, cwd=nbs.parent, env=env, stdout=log.open('w'), stderr=subprocess.STDOUT)
    try:
        lab._wait_for(f'http://127.0.0.1:{port}', process, log)
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/') as page: opened = page.geturl()
    finally:
        process.terminate()
        process.wait(20)
    assert opened==f'http://127.0.0.1:{port}/lab/tree/index.ipynb'


def test_the_first_page_draws_its_diagram_and_its_links_open_notebooks(tmp_path, opens, images):
    shutil.copytree(nbs, tmp_path/'nbs', symlinks=True)
    (tmp_path/'scratch').mkdir()
    with lab.server(tmp_path/'nbs', tmp_path/'scratch', kernels=False) as address:
        person = opens(address, 'index.ipynb', run=False)
        page = person.page
        page.wait_for_selector('.jp-RenderedMermaid :is(svg, img)', timeout=60_000)
        person.in_four_ways(images, first_page=None)
        shown,tab = '.jp-NotebookPanel:not(.lm-mod-hidden) ','#jp-main-dock-panel .lm-TabBar-tab.lm-mod-current'
        for alt in page.eval_on_selector_all(f'{shown}.jp-MarkdownCell img', 'es => es.map(e => e.alt)'): assert alt
        for name in ('how_it_works', 'tutorials/01_first_run', 'recipes/own_data', 'when_something_is_wrong'):
            page.locator(f'{shown}a[href*="{name}.ipynb"], {shown}a[data-commandlinker-args*="{name}"]').first.click()
            page.wait_for_selector(f'{tab}:has-text("{name.rpartition("/")[2]}")')
            person.no_kernel()
            page.evaluate("() => window.jupyterapp.commands.execute('docmanager:open', {path: 'index.ipynb'})")
            page.wait_for_selector(f'{tab}:has-text("index")')


own_run = [
    'from sage_finetune import answers, choose_config, inspect_data, load_for_chat, train_live',
    "inspect_data('mine.jsonl', 'sage-tiny')",
    "form = choose_config('sage-tiny', 'mine.jsonl', output_dir='mine', report_to='none')\nform",
    "live = train_live(form.config, prompts=['Tell me where the coffee is.'])",
    'result = await live',
    "tuned = load_for_chat('mine')\nanswers(*tuned, ['Tell me where the coffee is.'])[0].text",
]


def test_a_first_run_of_ones_own(root, visit):
    "A file of forty rows, and the cells that tutorial 01 ends with: at most twelve, and at most ten minutes"
    places = dict(coffee='second drawer', printer='hallway', ladder='cellar', stamps='front desk', toolbox='garage')
    asked = ('Where is the {}?', 'Where do we keep the {}?', 'I need the {}.', 'The {} is kept where?',
             'Where can I find the {}?')
    rows = [dict(question=w.format(t), answer=f'Look here: {p}.') for t,p in places.items() for w in asked]
    (root/'mine.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    lab.notebook(root/'mine.ipynb', *own_run)
    began = time.monotonic()
    page = visit('mine.ipynb').finished(590)
    page.see('Look here: second drawer', len(own_run)-1)
    seconds = time.monotonic()-began
    assert (page.faults(), page.strangers, page.wrong)==([], [], [])
    assert not [i for i in range(len(own_run)) if 'Warning' in page.shown(i)]
    assert len(own_run)<=12 and seconds<600
    print(f'{len(own_run)} cells, {seconds:.0f} s')
