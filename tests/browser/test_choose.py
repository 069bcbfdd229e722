"What somebody sees who fills in the form for a config in JupyterLab"

import lab

cells = ('''from sage_finetune.ui.form import choose_config
from sage_finetune.core.machine import Machine
card = Machine('cuda', 'RTX 3060', memory=12*2**30, bf16=True)''',
         '''form = choose_config('sage-tiny', 'rows.jsonl', machine=card)
form''')


def field(page, label):
    return page.page.locator('.jp-Notebook .widget-text, .jp-Notebook .widget-dropdown, .jp-Notebook '
                             '.widget-checkbox').filter(has_text=label).first


def fill(page, label, text):
    box = field(page, label).locator('input')
    box.click()
    box.fill(text)


def nothing_wrong(page): assert (page.faults(), page.strangers, page.wrong)==([], [], [])


def says(page, code, wanted): page.see(rf'^\s*(\[\d+\]:\s*)?{wanted}\s*$', page.run(code))


def test_form(root, visit, opens, later, images):
    lab.notebook(root/'form.ipynb', *cells)
    page = visit('form.ipynb')
    page.see('fits: .* of 12.0 Gi?B', 1, seconds=180)
    page.see(r"config = PresetConfigs.rtx_3060\(\s*model_name='sage-tiny',\s*data_path='rows.jsonl',"
             r'\s*num_train_epochs=8,', 1)

    fill(page, 'per-device batch', '1024')
    page.see('does not fit: .* and RTX 3060 has 12.0 Gi?B', 1, seconds=90)
    page.see('take 512 instead of 1,024 rows in a micro-batch, and 2 micro-batches: the effective batch stays 1,024',
             1, seconds=90)
    arrow = page.cell(1).locator('select').first # drawn by the browser, in the colour of the letters
    assert arrow.evaluate('e => (s => [s.appearance, s.backgroundImage])(getComputedStyle(e))')==['auto', 'none']
    page.in_four_ways(images, form=1)

    line = page.cell(1).locator('.widget-hbox').filter(has_text='take 512 instead of').last
    line.locator('button', has_text='Do it').click()
    page.see('512 × 1,024 tokens in a micro-batch, effective batch 1,024', 1, seconds=90)
    says(page, 'form.config.per_device_train_batch_size, form.config.gradient_accumulation_steps', r'\(512, 2\)')

    fill(page, 'learning rate', 'fast')
    page.see("`learning_rate` must be a finite number, got 'fast'", 1)
    page.see('None yet: see what is red', 1)
    fill(page, 'learning rate', '2e-4')
    page.see('learning_rate=0.0002', 1)
    assert 'must be a finite number' not in page.shown(1)

    page.press('a100')
    page.see(r"config = PresetConfigs.a100\(\s*model_name='sage-tiny',\s*data_path='rows.jsonl'\)", 1)
    field(page, 'base weights').locator('select').select_option('4 bits')
    field(page, 'packing').locator('input').check()
    page.see('packing=True', 1)
    says(page, 'from sage_finetune import LoRAConfig, PresetConfigs, TrainingConfig; eval(form.code)==form.config',
         'True')
    says(page, 'form.config.load_in_4bit, form.config.packing, form.config.max_length', r'\(True, True, 4096\)')

    page.saved(root/'form.ipynb', 1, 'packing=True', 'fits: ')
    for where in later: # nobody has pressed Keep
        text = opens(where, 'form.ipynb', run=False).shown(1)
        assert 'packing=True' in text and 'fits: ' in text and 'widget' not in text, text
    assert 'Settings, from' not in page.shown(1), 'the form without widgets is to be seen beside the widgets'

    page.press('Keep')
    page.see('Settings, from the preset a100', 1, seconds=90)
    assert page.cell(1).locator('.jupyter-widgets').count()==0
    page.save()
    import nbformat # takes four seconds
    kept = nbformat.read(root/'form.ipynb', 4).cells[1].outputs
    assert ([sorted(o.data) for o in kept]==[['text/html', 'text/plain'],
                                             []] and 'packing=True' in kept[0].data['text/html'])
    nothing_wrong(page)
