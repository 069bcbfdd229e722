"""Each tutorial as a reader meets it: run from top to bottom in JupyterLab, and its form, dashboard, chat and
slider used on the way
"""
import re
import subprocess
import sys
from pathlib import Path

import lab
import pytest

folder = Path(__file__).parents[2]/'nbs'/'tutorials'
tutorials = sorted(p.stem for p in folder.glob('*.ipynb'))
# in the prose of every tutorial; it is refused here like all other strangers
badge = 'https://colab.research.google.com/assets/colab-badge.svg'


def nothing_wrong(page): assert (page.faults(), [s for s in page.strangers if s!=badge], page.wrong)==([], [], [])


def tutorial(root, name, copy=''):
    "A copy to work on, without its outputs; its name, and what those outputs are"
    import nbformat # takes four seconds
    book = nbformat.read(folder/f'{name}.ipynb', 4)
    stored = {i: c.outputs for i,c in enumerate(book.cells) if c.cell_type=='code' and c.outputs}
    for i in stored: book.cells[i].outputs = []
    imports = next(c for c in book.cells if c.source.startswith('import ')) # each copy keeps its runs for itself
    imports.source = f"import os\nos.environ['SAGE_RUNS'] = '~/{copy}runs'\n{imports.source}"
    nbformat.write(book, root/f'{copy}{name}.ipynb')
    return f'{copy}{name}.ipynb',stored


def drawn(page, i):
    return page.cell(i).locator('.jp-Cell-outputArea img').evaluate_all(
        'es => es.map(e => e.complete && e.naturalWidth > 300)')


def finding(outputs):
    "A pattern for what a cell says, with any figures"
    text = '\n'.join(o['data']['text/plain'] for o in outputs if 'text/plain' in o.get('data', {}))
    return re.sub(r'\d[\d,.]*', lambda m: r'\d[\d,.]*', re.escape(text).replace('\\,', ',').replace('\\.', '.'))


def test_a_finding_may_have_other_figures():
    said = [dict(data={'text/plain': "'10 of 10 right (all); 6.79 → 0.01'"})]
    assert (re.search(finding(said), "'9 of 10 right (all); 7.1 → 0.002'")
            and not re.search(finding(said), "'9 of 10 wrong (all); 7.1 → 0.002'"))


@pytest.mark.parametrize('name', tutorials)
def test_runs_from_top_to_bottom(name, root, visit):
    copy,stored = tutorial(root, name)
    page = visit(copy).finished(300)
    nothing_wrong(page)
    # what the tutorial itself holds is its finding
    held = [i for i in stored if 'assert ' in page.source(i) and {*stored[i][0].get('data', {})}=={'text/plain'}]
    assert held
    for i in held: page.see(finding(stored[i]), i)
    for i,outputs in stored.items():
        kinds = {kind for o in outputs for kind in o.get('data', {})}
        assert page.shown(i).strip() or drawn(page, i), f'cell {i} shows nothing'
        if 'image/png' in kinds: assert drawn(page, i)==[True], f'the picture of cell {i} is not drawn'
        if 'text/html' in kinds:
            assert page.cell(i).locator('.jp-RenderedHTMLCommon').count(), f'cell {i} shows text for HTML'


# First run: choose, train, talk, pause, stop, go on, compare

def chosen(page):
    "Fill in the form: forty epochs instead of eight, which are two hundred steps"
    form = page.at('form = choose_config(')
    page.run_cells(0, form)
    page.see(r'fits: .* of [\d.]+ GiB', form, seconds=180)
    field = page.cell(form).locator('.widget-text').filter(has_text='epochs').locator('input')
    field.click()
    field.fill('forty')
    page.see("`num_train_epochs` must be a .* number, got 'forty'", form)
    field.fill('40')
    page.see('num_train_epochs=40', form)
    return form


def steered(page, cell, notebook, images):
    "Chat, pause, go on, stop; the step where it stopped"
    page.see('Training', cell, seconds=120)
    first = lab.beyond(page, cell, 200, 0)
    page.press('Pause')
    page.see('Paused', cell)
    page.see(r'time\s+\d.* left', cell)
    page.see(r'tokens/s', cell)
    page.see(r'memory so far\s*[\d.]+ [GM]i?B of [\d.]+ GiB', cell)
    page.page.wait_for_timeout(1500)
    still = lab.steps(page, cell, 200)
    page.page.wait_for_timeout(1500)
    assert lab.steps(page, cell, 200)==still>=first
    # in the middle of a run
    left = page.saved(notebook, cell, 'Paused', f'{still} of 200', 'Tell me where the coffee is.')
    assert [sorted(o.data) for o in left]==[['application/vnd.jupyter.widget-view+json', 'text/plain'],
                                            ['text/html', 'text/plain']]
    page.enter('Where is the printer?', hint='Ask both')
    assert int(page.see(r'Where is the printer\?\s+base\s+\S[^▌]+tuned, step (\d+)\s+[^▌\s]', cell)[1])==still
    turns = page.cell(cell).locator('input[type=checkbox]')
    turns.check()
    page.enter('And the ladder?', hint='Ask both')
    page.see(r'2\. And the ladder\?\s+base\s+\S[^▌]+tuned, step \d+\s+[^▌\s]', cell)
    turns.uncheck()
    page.press('Go on')
    page.see('Training', cell)
    later = lab.beyond(page, cell, 200, still)
    page.enter('Where is the ladder?', hint='Ask both') # while it trains
    asked = page.see(r'Where is the ladder\?\s+base\s+\S[^▌]+tuned, step (\d+)\s+[^▌\s]', cell)
    assert int(asked[1])>=later
    lab.beyond(page, cell, 200, 60)
    page.press('Pause')
    page.see('Paused', cell)
    page.press('Again') # the last question once more; its base is known
    page.see(r'Where is the ladder\?\s+base\s+\S[^▌]+tuned, step (6\d|[7-9]\d|\d{3})\s+Look here: cellar\.', cell)
    page.in_four_ways(images, dashboard=cell)
    page.press('Stop and save')
    stopped = int(page.see(r'stopped at step (\d+) of 200', cell, seconds=90)[1])
    page.settled(cell)
    page.see('Where is the printer', cell) # the talk stays too
    return stopped


def test_first_run_is_steered(root, visit, opens, later, images, tmp_path):
    name,_ = tutorial(root, '01_first_run', 'steered_')
    page = visit(name, run=None)
    form = chosen(page)
    cell = page.at('live = train_live(')
    page.run_cells(form+1, cell)
    stopped = steered(page, cell, root/name, images)

    again = page.run('live.go_on()', cell+1)
    page.see('Training', again, seconds=120)
    assert stopped<lab.beyond(page, again, 200, stopped)<200
    waits = page.at('result = await live')
    page.run_cells(waits, waits)
    page.press('Pause')
    page.see('Paused', again) # the buttons work while a cell awaits the run
    page.press('Go on')
    page.see('Done', again, seconds=180)
    page.see('200 of 200', again)
    page.settled(again)
    page.finished()

    page.run_cells(waits+1, page.page.locator('.jp-Notebook .jp-Cell').count()-1)
    page.see(r'\d+ of 10 new questions right; held-out loss \d\.\d+ → 0\.\d+', seconds=180)
    page.finished()
    page.see(r'Look here: second drawer\.', page.at('comparison = compare_answers('))
    page.save()
    nothing_wrong(page)
    for address,who in zip(later, ('own', 'other')):
        copy = opens(address, name, run=False)
        sees_form(copy.cell(form))
        sees_run(copy.cell(again))
        if who=='other': copy.picture(images/'dashboard_left_behind.png', again)
        assert {*copy.strangers}<={badge}
    converted(root/name, opens, tmp_path)


def sees_form(place):
    "The form as it was left, and no word of widgets"
    text = place.inner_text()
    assert 'num_train_epochs=40' in text and 'fits:' in text and 'widget' not in text, text


def sees_run(place):
    "A picture that is drawn, a table of figures, the answers"
    assert place.locator('img').first.evaluate('e => [e.complete, e.naturalWidth > 300]')==[True, True]
    text = place.inner_text()
    assert all(w in text for w in ('200 of 200', 'Tell me where the coffee is.', 'Look here: second drawer.',
                                   'held-out loss')), text
    assert '█'*16 in text, 'the bar of a finished run is not full'
    assert 'widget' not in text


def converted(path, opens, tmp_path):
    "What nbconvert makes of it"
    subprocess.run([sys.executable, '-m', 'nbconvert', '--to', 'html', '--output-dir', str(tmp_path), '--output',
                    'page.html', str(path)], check=True, capture_output=True)
    page = opens.empty()
    page.route('**/*', lambda r: r.continue_() if r.request.url.startswith(('file:', 'data:')) else r.abort())
    page.goto((tmp_path/'page.html').as_uri(), wait_until='domcontentloaded')
    cells = page.locator('.jp-CodeCell')
    sees_form(cells.filter(has_text='form = choose_config('))
    sees_run(cells.filter(has_text='live.go_on()').filter(has=page.locator('img')))


# What it learns: the slider

def boxes(page, cell):
    "The two newest answers, each with its heading"
    shown = page.cell(cell).locator('div[style*="flex:1 1 18em"]:visible')
    last = shown.count()-1  # the newest is at the bottom
    return [shown.nth(k).inner_text().split('\n', 1) for k in (last-1, last)]


def slid(page, cell, key, name):
    "Move the slider by a key, and wait until the second answer is that of this strength"
    page.cell(cell).locator('.noUi-handle').first.focus()
    page.page.keyboard.press(key)
    page.page.wait_for_function(
        f'''() => [...document.querySelectorAll('.jp-Notebook div[style*="flex:1 1 18em"]')].slice(-1)
        .some(e => e.innerText.startsWith({name!r}) && !e.innerText.includes('▌'))''', timeout=60_000)
    return boxes(page, cell)


def test_what_it_learns_with_the_slider(root, visit, opens, later, images):
    file,_ = tutorial(root, '02_what_it_learns', 'steered_')
    page = visit(file, run=None)
    cell = page.at('conversation = talk(')
    page.run_cells(0, cell)
    page.see('0 is the base, 1 the tuned model', cell, seconds=240)
    assert boxes(page, cell)[1][0]=='tuned', 'what was asked by code is not to be seen'

    page.enter('In which hall is the viola?', hint='Ask both')
    page.see(r'The viola rehearses in the \w+ hall\.', cell)
    # the slider asks anew, and the base keeps its answer
    (left,base),(right,tuned) = slid(page, cell, 'ArrowRight', 'tuned × 1.05')
    assert (left, right)==('base', 'tuned × 1.05') and base!=tuned and 'rehearses' not in base
    page.in_four_ways(images, talk=cell)
    (_,base),(name,tuned) = slid(page, cell, 'Home', 'base')
    assert name=='base' and base==tuned, 'strength 0 is not the base'
    assert slid(page, cell, 'End', 'tuned × 2')[1][1]!=tuned
    page.save()
    for address in later: # it was not closed
        copy = opens(address, file, run=False)
        text = copy.shown(cell)
        assert 'In which hall is the viola?' in text and 'tuned × 1.05' in text and 'widget' not in text, text
    page.press('Keep')
    page.see('halls: base and tuned', cell)
    assert page.cell(cell).locator('.jupyter-widgets').count()==0
    nothing_wrong(page)
