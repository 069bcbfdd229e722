"Somebody without a mouse: each control is reached by Tab, says what it is, and shows that it has the focus"
import lab
from test_dashboard import prompts, setup

# of the outputs of a cell: the controls that are to be seen and act, each with a number
_controls = """e => [...e.querySelectorAll(`button, input, select, textarea, summary, a[href], [role=slider],
    [tabindex="0"], [contenteditable="true"]`)]
  .filter(c => c.checkVisibility() && !c.disabled)
  .map((c, i) => (c.dataset.told = i, c.outerHTML.slice(0, 120)))"""
# of what has the focus: its number, its name as it is read out, and how it looks
_focused = """() => { const c = document.activeElement, s = getComputedStyle(c);
  const words = [c.ariaLabel, ...(c.getAttribute('aria-labelledby') || '').split(' ').filter(Boolean)
      .map(i => document.getElementById(i)?.innerText), ...[...(c.labels || [])].map(l => l.innerText),
      c.matches('button, a, summary') ? c.innerText : '', c.title, c.placeholder,
      c.closest('.widget-slider')?.querySelector('.widget-label')?.innerText]; // beside it: ipywidgets names no handle
  return {told: c.dataset.told, name: words.filter(w => w && w.trim())[0] || '', html: c.outerHTML.slice(0, 120)} }"""
_look = """c => { const s = getComputedStyle(c);
  return [s.outlineStyle, s.outlineWidth, s.outlineColor, s.boxShadow, s.borderColor, s.backgroundColor].join() }"""


def walked(page, cell):
    "Names of the controls of a cell, in the order in which Tab reaches them; what is wrong with any is told"
    area = page.cell(cell).locator('.jp-Cell-outputArea')
    there = area.evaluate(_controls)
    control = lambda number: area.locator(f'[data-told="{number}"]')
    page.page.evaluate('() => document.activeElement.blur()') # what has the focus is not as it is without
    plain = [control(i).evaluate(_look) for i in range(len(there))]
    control(0).focus()
    found = {}
    for _ in range(2*len(there)+10):
        now = page.page.evaluate(_focused)
        if now['told'] is None or now['told'] in found: break
        assert now['name'], f"without a name: {now['html']}"
        assert control(now['told']).evaluate(_look)!=plain[int(now['told'])], f"no sign of focus: {now['html']}"
        found[now['told']] = now['name']
        page.page.keyboard.press('Tab')
        page.page.wait_for_timeout(50)
    missed = [html for i,html in enumerate(there) if str(i) not in found]
    assert not missed, f'Tab does not reach {missed}'
    return [*found.values()]


def test_form(root, visit):
    lab.notebook(root/'keys.ipynb', "from sage_finetune import choose_config\n"
                 "form = choose_config('sage-tiny', 'rows.jsonl')\nform")
    page = visit('keys.ipynb')
    page.see('fits: ', 0, seconds=180)
    for theme in ('Light', 'Dark'):
        page.theme(theme)
        names = walked(page, 0)
        for name in ('model', 'data', 'learning rate', 'packing', 'Look', 'Keep', 'YAML'):
            assert any(name in n for n in names), (name, names)


def test_dashboard(root, visit):
    lab.notebook(root/'keys_live.ipynb', setup.replace('{steps}', '400'), f'live = train_live(run, {prompts})')
    page = visit('keys_live.ipynb')
    page.see('Training', 1, seconds=180)
    page.press('Pause')
    page.see('Paused', 1)
    page.enter('Where is the kettle?', hint='Ask both')
    page.see(r'Where is the kettle\?\s+base\s+\S[^▌]+tuned, step \d+\s+[^▌\s]', 1)
    names = walked(page, 1)
    for name in ('Go on', 'Stop and save', 'log axis', 'smoothing', 'over it', 'strength', 'Ask', 'System message',
                 'temperature', 'remember'): assert any(name in n for n in names), (name, names)
    go_on = page.button('Go on')
    go_on.focus()
    page.page.keyboard.press('Space')
    page.see('Training', 1)
    page.run('live.stop()')
