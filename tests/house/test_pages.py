"The documentation site without Quarto: every dead link and missing picture is found, and this site has none"
import base64, importlib.util, json, os, re, sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip('nbdev')
from fastcore.nbio import dict2nb, read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location('pages', ROOT/'tools/pages.py')
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)
if str(ROOT/'tools') not in sys.path: sys.path.append(str(ROOT/'tools')) # where pyproject.toml has a processor of nbdev

PNG = base64.b64encode(b'\x89PNG\r\n\x1a\n').decode()
SOURCE = 'https://github.com/me/it/blob/main/'
COLAB = 'https://colab.research.google.com/github/me/it/blob/main/'


def notebook(*markdown, data=None, code='#| fig-alt: A line\n1'):
    "A notebook of these Markdown cells, and a code cell with an output"
    cells = [dict(cell_type='markdown', metadata={}, source=text) for text in markdown]
    outputs = [dict(output_type='display_data', metadata={}, data=data)] if data else []
    cells.append(dict(cell_type='code', metadata={}, source=code, outputs=outputs, execution_count=None))
    return dict2nb(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))


def site_of(folder, sidebar=('00_one.ipynb', 'more/two.ipynb')):
    "A site of two pages and a picture, and its pages"
    nbs = folder/'nbs'
    (nbs/'more').mkdir(parents=True)
    (nbs/'here.png').write_bytes(base64.b64decode(PNG))
    (folder/'_quarto.yml').write_text(json.dumps(dict(website=dict(
        sidebar=dict(contents=[dict(section='All', contents=[dict(text='x', href=h) for h in sidebar])])))))
    site = pages.Site(SimpleNamespace(config_path=folder, nbs_path=nbs, git_url='https://github.com/me/it',
                                      branch='main', doc_host='https://me.github.io', doc_baseurl='/it'))
    found = {nbs/'00_one.ipynb': notebook('# One', '## What it *is*, and `why`\n\n<a id="there"></a>',
                                          code='#| export\ndef Thing(): pass'),
             nbs/'more'/'two.ipynb': notebook('# Two')}
    for path,nb in found.items():
        path.write_text(json.dumps(nb))
        site.add(path, nb)
    return site,nbs/'more'/'two.ipynb'


GOOD = ('[a](../00_one.ipynb)', '[a](../00_one.ipynb#what-it-is-and-why)', '[a](../00_one.ipynb#there)',
        '[a](../00_one.ipynb#thing)', '![a](../here.png "title")', '[a](#two)',
        '<img src="../here.png" alt="here">', '[a](https://example.org/gone)',
        f'[![a](https://x.org/b.svg)]({COLAB}nbs/more/two.ipynb)', f'[a]({SOURCE}_quarto.yml)',
        '[a](https://me.github.io/it/one.html#thing)',
        '<!-- begin -->\n**a**\n<!-- end -->\nb',
        '`[a](gone.png)`', '```\n[a](gone.png)\n```', '[a](mailto:me@example.org)')

BAD = {'[a](three.ipynb)': 'three.ipynb does not exist', '[a](../00_one.ipynb#gone)': '00_one.ipynb has '
       'no such heading', '[a](#gone)': 'two.ipynb has no such heading', '![a](gone.png)': 'gone.png does not exist',
       '<img src="gone.png" alt="gone">': 'gone.png does not exist', '![a](attachment:gone.png)': 'is not attached',
       f'[a]({COLAB}nbs/00_one.ipynb)': 'opens another notebook',
       f'[a]({SOURCE}gone.md)': 'gone.md does not exist', '[a](https://me.github.io/it/gone.html)':
       'gone.html does not exist', '[![a](gone.svg)](https://x.org)': 'gone.svg does not exist',
       '![](../here.png)': 'here.png has no alt text', '![ ](../here.png)': 'has no alt text',
       '<img src="../here.png">': 'a picture has no alt text', '<img src="../here.png" alt="">': 'has no alt text',
       '<b onclick="go()">a</b>': 'a keyboard does not reach', '<i tabindex="-1">a</i>': 'a keyboard does not reach',
       '<!-- begin -->**a**<!-- end --> b': 'what stands behind a comment is shown as it is typed'}


@pytest.mark.parametrize('text', GOOD)
def test_what_leads_somewhere_passes(text, tmp_path):
    site,page = site_of(tmp_path)
    nb = notebook('# Two', text, data={'image/png': PNG})
    assert list(pages.faults_of(page, nb, site)) == []


@pytest.mark.parametrize('text,told', BAD.items())
def test_what_leads_nowhere_is_told(text, told, tmp_path):
    site,page = site_of(tmp_path)
    in_prose,in_output = notebook('# Two', text),notebook('# Two', data={'text/markdown': text})
    for nb in in_prose,in_output: assert [told in fault for fault in pages.faults_of(page, nb, site)] == [True]


def test_a_stored_picture_that_is_none_is_told(tmp_path):
    site,page = site_of(tmp_path)
    assert list(pages.faults_of(page, notebook(data={'image/png': 'Z29uZQ=='}), site)) == ['a stored picture is no PNG']


def test_a_picture_that_a_cell_draws_says_what_is_to_be_seen(tmp_path):
    site,page = site_of(tmp_path)
    for code in ('figure', '#| fig-alt:\nfigure', '# fig-alt: a curve\nfigure'):
        told, = pages.faults_of(page, notebook(data={'image/png': PNG}, code=code), site)
        assert told.startswith('the picture of a cell has no alt text')


@pytest.mark.parametrize('sidebar,told', [
    (['00_one.ipynb'], 'more/two.ipynb is in no section'),
    (['00_one.ipynb', 'more/two.ipynb', 'gone.ipynb'], 'gone.ipynb does not exist'),
    (['00_one.ipynb', '00_one.ipynb', 'more/two.ipynb'], '00_one.ipynb is named twice')])
def test_the_sidebar_has_every_page_once(sidebar, told, tmp_path):
    assert list(pages.sidebar_faults(site_of(tmp_path/'good')[0])) == []
    assert [told in fault for fault in pages.sidebar_faults(site_of(tmp_path/'bad', sidebar)[0])] == [True]


@pytest.fixture(scope='module')
def this_site():
    "Our own site, and its pages"
    site = pages.Site(get_config(ROOT))
    found = {path.absolute(): read_nb(path) for path in nbglob(get_config(ROOT).nbs_path, as_path=True).sorted()}
    for path,nb in found.items(): site.add(path, nb)
    return site,found


def test_this_site_has_no_dead_link(this_site):
    site,found = this_site
    faults = {path.name: told for path,nb in found.items() if (told := list(pages.faults_of(path, nb, site)))}
    assert faults == {}
    assert list(pages.sidebar_faults(site)) == []


@pytest.mark.parametrize('one_of', [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_notebook_makes_a_page(one_of, monkeypatch, capsys):
    "Links are followed in all of them; every fifth is made a page, each of them by `make pages` and `make test-slow`"
    seen,fault = count(),pages.fault
    monkeypatch.setattr(pages, 'fault', lambda notebook: None if next(seen)%one_of else fault(notebook))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(pages.processors, 'get_config', get_config)
    with mock.patch.dict(os.environ): failed = pages.main()
    assert not failed, capsys.readouterr().out
    assert '02_trainer.ipynb: ok' in capsys.readouterr().out


def test_a_diagram_is_drawn_by_lab_and_by_quarto():
    "JupyterLab and GitHub draw ```mermaid, Quarto ```{mermaid}: the notebooks have the one, their pages the other"
    import diagrams
    index = read_nb(ROOT/'nbs/index.ipynb')
    drawn = [cell for cell in index.cells if '```mermaid\n' in ''.join(cell.source)]
    assert len(drawn)==1 and '{mermaid}' not in json.dumps(index.cells)
    for cell in drawn: diagrams.for_quarto(cell)
    assert '```{mermaid}\nflowchart' in drawn[0].source and '```mermaid' not in drawn[0].source
    for name in 'README.md', 'README.zh.md': assert '```mermaid\n' in (ROOT/name).read_text(encoding='utf-8')
    assert get_config(ROOT).doc_procs==['diagrams:for_quarto']


def test_both_orders_are_told():
    "The sidebar is the order to read in; the line of the law is that of CONTRIBUTING"
    law = re.search(r'^core < .+$', (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8'), re.M)[0]
    assert any(law in ''.join(cell.source) for cell in read_nb(ROOT/'nbs/how_it_works.ipynb').cells)
    bar = (ROOT/'_quarto.yml').read_text(encoding='utf-8')
    sections = 'Start', 'Tutorials', 'Recipes', 'The story', 'core', 'ui', '中文'
    named = [bar.index(f'section: {name}') for name in sections]
    assert named==sorted(named)


RECIPES = 'own_data own_template evaluation colab cluster wandb tool_calls images rewards'.split()


def test_the_recipes_are_there_and_run():
    "Each has code that the tests run, and something that is asserted"
    for name in RECIPES:
        cells = read_nb(ROOT/f'nbs/recipes/{name}.ipynb').cells
        run = [source for cell in cells if cell.cell_type=='code' and not re.search(
            r'^#\|\s*(eval: false|slow|notest|cuda)', source := ''.join(cell.source), re.M)]
        assert len(run)>=3 and any(re.search(r'\bassert |expect_fail|test_eq', source) for source in run), name


TUTORIALS = sorted((ROOT/'nbs/tutorials').glob('*.ipynb'))


def test_tutorials_are_numbered():
    assert (len(TUTORIALS)>=6
            and [path.stem[:3] for path in TUTORIALS] == [f'{k:02}_' for k in range(1, len(TUTORIALS)+1)])


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_ready_for_colab_and_holds_its_finding(path):
    cells = read_nb(path).cells
    sources = [''.join(cell.source) for cell in cells]
    code = [source for cell,source in zip(cells, sources) if cell.cell_type == 'code']
    assert f'nbs/tutorials/{path.name})' in sources[1] and sources[0].startswith('# ') and '\n> ' in sources[0]
    assert code[0].startswith('#| eval: false') and 'archive/refs/heads' in code[0]
    assert any(source.startswith("model_name = 'sage-tiny'") for source in code)
    assert any('assert ' in source for source in code)
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    assert outputs, 'it was saved without its outputs'
    assert not any(output.output_type in ('stream', 'error') for output in outputs)
    assert (not any('widget' in kind for output in outputs for kind in output.get('data', {}))
            and 'widgets' not in read_nb(path).metadata)
    assert not [folder for folder in ('/tmp', str(ROOT), str(Path.home())) if folder in json.dumps(outputs)]


def test_no_stored_output_tells_of_a_machine(this_site):
    "No warning of a library with its place, no progress bar, no folder of somebody's"
    for path,nb in this_site[1].items():
        for output in (o for cell in nb.cells for o in cell.get('outputs', ())):
            assert output.get('name')!='stderr', f'{path.name}: {output}'
            assert not re.search(r'site-packages|/home/|/root/|/tmp/', json.dumps(output)), f'{path.name}: {output}'
