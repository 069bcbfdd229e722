"What somebody sees who trains in JupyterLab: the dashboard, its buttons, a chat with the half-trained model, and what stays in the notebook"
import re
import subprocess
import sys
import time

import lab
import nbformat

setup = '''import tempfile, time
from pathlib import Path
from transformers import TrainerCallback
from sage_finetune.config import TrainingConfig
from sage_finetune.live import train_live
from sage_finetune.shapes import create_sample_data
from sage_finetune.trainer import LoRATrainer

class Slowly(LoRATrainer):
    def callbacks(self): return [*super().callbacks(), Rest()]

class Rest(TrainerCallback): # so that a fast machine leaves time for the buttons
    def on_step_end(self, args, state, control, **kwargs): time.sleep(.15)

folder = Path(tempfile.mkdtemp())
data = create_sample_data(folder/'sums.jsonl', 'qa', num_samples=300)
config = TrainingConfig(model_name='sage-tiny', data_path=data, output_dir=folder/'sums', test_size=0.1, max_steps={steps}, eval_steps=20, per_device_train_batch_size=8,
                        gradient_accumulation_steps=1, learning_rate=5e-3, logging_steps=5, report_to='none')
run = Slowly(config)'''
prompts = "prompts=['What is 12 plus 30?', 'What is 2 plus 2?'], every=10, max_new_tokens=24"


def steps(page, cell, most):
    "The step that the dashboard shows"
    return int(re.search(rf'([\d,]+) of {most}', page.shown(cell))[1].replace(',', ''))


def beyond(page, cell, most, step, seconds=60):
    "Wait until the dashboard shows a later step; which one"
    end = time.monotonic()+seconds
    while (now := steps(page, cell, most))<=step:
        assert time.monotonic()<end, f'still at step {now}'
        page.page.wait_for_timeout(200)
    return now


def nothing_wrong(page): assert (page.faults(), page.strangers, page.wrong)==([], [], [])


def test_start_chat_pause_stop_and_resume(root, visit, images):
    lab.notebook(root/'steer.ipynb', setup.replace('{steps}', '400'), f'live = train_live(run, {prompts})', '6*7')
    page = visit('steer.ipynb')
    page.see('Training', 1, seconds=180)
    assert page.shown(2).split()[-1]=='42', 'the notebook is not free while it trains'
    first = beyond(page, 1, 400, 3)
    page.see('time left', 1); page.see(r'tokens/s', 1); page.see(r'memory so far\s+[\d.]+ [GM]B of [\d.]+ GB', 1)

    page.enter('What is 5 plus 6?', hint='Ask the model')
    asked = int(page.see(r'What is 5 plus 6\? at step (\d+)\s+\S', 1)[1])
    assert asked>=first-1
    later = beyond(page, 1, 400, asked)

    page.press('Pause'); page.see('Paused', 1)
    page.page.wait_for_timeout(1500)
    still = steps(page, 1, 400)
    page.page.wait_for_timeout(1500)
    assert steps(page, 1, 400)==still>=later-1
    page.enter('What is 1 plus 1?', hint='Ask the model')
    assert int(page.see(r'What is 1 plus 1\? at step (\d+)\s+\S', 1)[1])==still
    answer = page.run("live.chat('What is 3 plus 4?', max_new_tokens=8)") # by code, in a cell below
    page.see(r"'.*'", answer)
    page.press('Go on'); page.see('Training', 1)
    beyond(page, 1, 400, max(still, 45), seconds=120)
    page.see(r'step 40', 1) # an answer that came while it trained
    for theme in ('Light', 'Dark'):
        page.theme(theme); page.picture(images/f'dashboard_{theme.lower()}.png', 1)
    page.theme('Light')

    page.press('Stop and save')
    stopped = int(page.see(r'stopped at step (\d+) of 400', 1, seconds=90)[1])
    assert page.cell(1).locator('.jupyter-widgets').count()==0 and page.cell(1).locator('img').count()==1
    page.see('What is 5 plus 6', 1) # the talk stays too

    again = page.run('live.go_on()')
    page.see('Training', again, seconds=120)
    assert beyond(page, again, 400, stopped)<400
    beyond(page, again, 400, stopped+3)
    last = page.run('live.stop(); live.wait(); live.board.phase')
    page.see("'stopped'", last, seconds=90)
    page.see('stopped at step', again)
    nothing_wrong(page)


def test_buttons_work_while_a_cell_awaits_the_run(root, visit, tmp_path, images):
    "And what stays is there without a kernel, without trust, and in what nbconvert makes of the notebook"
    lab.notebook(root/'await.ipynb', setup.replace('{steps}', '40'), f'live = train_live(run, {prompts})', 'result = await live\nresult.steps')
    page = visit('await.ipynb')
    page.see('Training', 1, seconds=180)
    page.press('Pause'); page.see('Paused', 1)
    page.press('Go on'); page.see('Training', 1)
    page.see('40', 2, seconds=120); page.finished()
    page.see('Done', 1)
    page.save(); nothing_wrong(page)
    stays(root/'await.ipynb')
    reopened(root, tmp_path, images)
    converted(root/'await.ipynb', tmp_path)


def stays(path):
    "The cell holds a picture and a page, and no widget"
    outputs = nbformat.read(path, 4).cells[1].outputs
    assert [sorted(o.data) for o in outputs]==[['image/png', 'text/plain'], ['text/html', 'text/plain']]
    page = outputs[1].data['text/html']
    assert all(w in page for w in ('40 of 40', 'What is 12 plus 30?', 'What is 2 plus 2?', 'held-out loss'))


def sees_the_run(page):
    "A picture that is drawn, a table of figures, the answers"
    area = page.locator('.jp-OutputArea-output, .jp-OutputArea-child')
    assert area.locator('img').first.evaluate('e => [e.complete, e.naturalWidth > 300]')==[True, True]
    text = '\n'.join(area.all_inner_texts())
    assert all(w in text for w in ('40 of 40', 'What is 12 plus 30?', 'What is 2 plus 2?', 'held-out loss')), text
    assert 'Error displaying widget' not in text and 'Loading widget' not in text


def reopened(root, tmp_path, images):
    "By a JupyterLab that has no kernel and does not trust the notebook"
    with lab.server(root, tmp_path/'other', kernels=False) as address, lab.person() as opens:
        page = opens(address, 'await.ipynb', run=False)
        sees_the_run(page.page)
        page.picture(images/'dashboard_left_behind.png', 1)
        assert page.strangers==[]


def converted(path, tmp_path):
    subprocess.run([sys.executable, '-m', 'nbconvert', '--to', 'html', '--output-dir', str(tmp_path), '--output', 'page.html', str(path)], check=True, capture_output=True)
    with lab.person() as opens:
        page = opens.empty()
        page.route('**/*', lambda r: r.continue_() if r.request.url.startswith(('file:', 'data:')) else r.abort())
        page.goto((tmp_path/'page.html').as_uri(), wait_until='domcontentloaded')
        sees_the_run(page)


def test_without_ipywidgets_one_page_is_replaced_in_place(root, visit):
    hidden = "import sys\nsys.modules['ipywidgets'] = None\n"+setup.replace('{steps}', '60')
    lab.notebook(root/'plain.ipynb', hidden, f'live = train_live(run, {prompts})')
    page = visit('plain.ipynb')
    page.see('without ipywidgets there are no buttons', 1, seconds=180)
    assert page.cell(1).locator('button').count()==0
    beyond(page, 1, 60, 3)
    drawn = page.cell(1).locator('polyline').first.get_attribute('points').count(',')
    at = page.run('live.pause()'); page.see('Paused', 1)
    assert page.cell(1).locator('polyline').first.get_attribute('points').count(',')>=drawn>=3
    page.run('live.go_on()'); page.run('live.wait().steps'); page.see('60', at+2, seconds=120)
    page.see('Done', 1); page.see('60 of 60', 1)
    assert page.cell(1).locator('img').count()==1
    nothing_wrong(page)


def test_a_run_that_fails_says_so_in_its_place(root, visit):
    lab.notebook(root/'fails.ipynb', setup.replace('{steps}', '8'),
                 "class Cut(TrainerCallback):\n    def on_step_end(self, args, state, control, **kwargs):\n        if state.global_step==3: raise RuntimeError('power cut')\n"
                 "class Unlucky(Slowly):\n    def callbacks(self): return [*super().callbacks(), Cut()]\nlive = train_live(Unlucky(config))")
    page = visit('fails.ipynb')
    page.see('Failed: RuntimeError: power cut', 1, seconds=180)
    at = page.run('try: live.wait()\nexcept RuntimeError as e: print(type(e).__name__, e)')
    page.see('RuntimeError power cut', at)
    nothing_wrong(page)
