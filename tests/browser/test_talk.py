"What somebody sees who talks to a run in JupyterLab: two answers, a slider, and what stays in the notebook"
import nbformat

import lab

train = '''import tempfile
from pathlib import Path
from sage_finetune.compare import Run, compare, runs
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.look import token_losses
from sage_finetune.shapes import create_sample_data
from sage_finetune.talk import talk
from sage_finetune.trainer import LoRATrainer

folder = Path(tempfile.mkdtemp())
sums = create_sample_data(folder/'sums.json', 'qa', 60)
def train(name, r, learning_rate):
    LoRATrainer(TrainingConfig(model_name='sage-tiny', data_path=sums, max_length=64, test_size=0.2, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=40, eval_steps=5,
                               logging_steps=2, learning_rate=learning_rate, report_to='none', output_dir=folder/name, lora=LoRAConfig(r=r)), quiet=True).train()
    return Run(folder/name)
large = train('large', 16, 5e-3)'''


def nothing_wrong(page): assert (page.faults(), page.strangers, page.wrong)==([], [], [])


def boxes(page, cell):
    "The two newest answers, without their headings"
    shown = page.cell(cell).locator('div[style*="flex:1 1 18em"]')
    return [shown.nth(k).inner_text().split('\n', 1) for k in (0, 1)]


def slide(page, key, name):
    "Move the slider to one of its ends, and wait until the second answer is that of this strength"
    page.page.locator('.jp-Notebook .noUi-handle').first.focus()
    page.page.keyboard.press(key)
    page.page.wait_for_function(f'''() => [...document.querySelectorAll('.jp-Notebook div[style*="flex:1 1 18em"]')].slice(1, 2).some(e => e.innerText.startsWith({name!r}) && !e.innerText.includes('▌'))''', timeout=60_000)
    return boxes(page, 1)


def test_talk(root, visit, images):
    lab.notebook(root/'talk.ipynb', train, 't = talk(large, max_new_tokens=24)\nt')
    page = visit('talk.ipynb')
    page.see('0 is the base, 1 the tuned model', 1, seconds=180)

    page.enter('What is 7 plus 4?', hint='Ask both')
    page.see(r'7 plus 4 is \d+\.', 1)
    (left,base),(right,tuned) = slide(page, 'ArrowRight', 'tuned × 1.05') # the slider asks anew, and the base keeps its answer
    assert (left, right)==('base', 'tuned × 1.05') and base!=tuned and '7 plus 4' not in base

    (_,base),(name,tuned) = slide(page, 'Home', 'base')
    assert name=='base' and base==tuned, 'strength 0 is not the base'
    (_,base),(name,strong) = slide(page, 'End', 'tuned × 2')
    assert strong!=tuned
    page.see(r'\[0, 1.05, 2\]|\[1.0, 1.05, 0.0, 2.0\]', page.run('[e.strength for e in t.said]'))
    page.enter("What is 12 plus 5?", hint="Ask both")
    page.see("What is 12 plus 5\\?", 1)
    slide(page, 'ArrowLeft', 'tuned × 1.95')
    for theme in ('Dark', 'Light'): page.theme(theme); page.picture(images/('talk.png' if theme=='Light' else 'talk_dark.png'), 1)

    page.press('Keep')
    page.see('large: base and tuned', 1)
    assert page.cell(1).locator('.jupyter-widgets').count()==0
    page.save()
    kept = nbformat.read(root/'talk.ipynb', 4).cells[1].outputs
    assert [sorted(o.data) for o in kept]==[['text/html', 'text/plain']] and 'What is 7 plus 4?' in kept[0].data['text/plain']
    nothing_wrong(page)


def test_row_and_comparison(root, visit, images):
    lab.notebook(root/'look.ipynb', train+"\nsmall = train('small', 4, 2e-3)", "token_losses(large.model, large.tokenizer, large.data[1][2], name='held-out row 2')", 'compare(small, large)', 'runs(folder)', 'large')
    page = visit('look.ipynb').finished(300)
    page.see(r'held-out row 2: loss \d\.\d+ → 0\.\d+ nats over \d+ learned; it fell for \d+; still above 1: \d', 1)
    assert 'before' not in page.shown(1), 'the table is shown and not the text'
    titles = page.cell(1).locator('span[title]')
    assert titles.filter(has_text='plus').count() or titles.count()>20
    assert '→' in titles.last.get_attribute('title')
    page.see(r'learning_rate\s*0\.002\s*0\.005', 2); page.see(r'steps\s*40\s*40', 2)
    assert page.cell(2).locator('img').count()==1
    page.see(r'large\s*custom\s*sage-tiny\s*trained', 3); page.see('large: trained', 4)
    for theme in ('Dark', 'Light'):
        page.theme(theme)
        for name,cell in (('row', 1), ('compare', 2)): page.picture(images/(f'{name}.png' if theme=='Light' else f'{name}_dark.png'), cell)
    nothing_wrong(page)
