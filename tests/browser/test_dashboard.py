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
from sage_finetune.sources import save_rows
from sage_finetune.trainer import LoRATrainer

class Slowly(LoRATrainer):
    def callbacks(self): return [*super().callbacks(), Rest()]

class Rest(TrainerCallback): # so that a fast machine leaves time for the buttons
    seconds = .15
    def on_step_end(self, args, state, control, **kwargs): time.sleep(self.seconds)

folder = Path(tempfile.mkdtemp())
rooms = dict(microscope=12, printer=7, kettle=3, library=20, workshop=15, piano=9, archive=31, telescope=40, fridge=2, scanner=18)
ways = 'Where is the {}?', 'In which room do I find the {}?', 'Tell me where the {} is.', 'The {}: where?'
data = save_rows(folder/'rooms.jsonl', [dict(question=way.format(thing), answer=f'The {thing} is in room {room}.') for way in ways for thing,room in rooms.items()])
config = TrainingConfig(model_name='sage-tiny', data_path=data, output_dir=folder/'rooms', test_size=0.1, max_steps={steps}, eval_steps=20, per_device_train_batch_size=8,
                        gradient_accumulation_steps=1, learning_rate=5e-3, logging_steps=5, report_to='none')
run = Slowly(config)'''
prompts = "prompts=['Where is the microscope?', 'Tell me where the kettle is.'], every=10, max_new_tokens=24"


def steps(page, cell, most):
    "The step that the dashboard shows"
    found = re.search(rf'([\d,]+) of {most}', page.shown(cell))
    return int(found[1].replace(',', '')) if found else -1 # before the first step it does not know how many there will be


def beyond(page, cell, most, step, seconds=60):
    "Wait until the dashboard shows a later step; which one"
    end = time.monotonic()+seconds
    while (now := steps(page, cell, most))<=step:
        assert time.monotonic()<end, f'still at step {now}'
        page.page.wait_for_timeout(200)
    return now


def nothing_wrong(page): assert (page.faults(), page.strangers, page.wrong)==([], [], [])


def test_start_chat_pause_stop_and_resume(root, visit, images):
    lab.notebook(root/'steer.ipynb', setup.replace('{steps}', '240'), f'live = train_live(run, {prompts})', '6*7')
    page = visit('steer.ipynb')
    page.see('Training', 1, seconds=180)
    assert page.shown(2).split()[-1]=='42', 'the notebook is not free while it trains'
    first = beyond(page, 1, 240, 3)
    page.see('time left', 1); page.see(r'tokens/s', 1); page.see(r'memory so far\s*[\d.]+ [GM]B of [\d.]+ GB', 1)

    page.enter('Where is the piano?', hint='Ask the model')
    asked = int(page.see(r'Where is the piano\? at step (\d+)\s*\S', 1)[1])
    assert asked>=first-1
    later = beyond(page, 1, 240, asked)

    page.press('Pause'); page.see('Paused', 1)
    page.page.wait_for_timeout(1500)
    still = steps(page, 1, 240)
    page.page.wait_for_timeout(1500)
    assert steps(page, 1, 240)==still>=later-1
    page.enter('The library: where?', hint='Ask the model')
    assert int(page.see(r'The library: where\? at step (\d+)\s*\S', 1)[1])==still
    answer = page.run("live.chat('Where is the printer?', max_new_tokens=8)") # by code, in a cell below
    page.see(r"'.*'", answer)
    page.press('Go on'); page.see('Training', 1)
    page.run('Rest.seconds = 0'); beyond(page, 1, 240, 160, seconds=240); page.run('Rest.seconds = .15')
    page.see(r'step (\d+–)?1[67]0', 1) # an answer that came while it trained
    for theme in ('Light', 'Dark'):
        page.theme(theme); page.picture(images/f'dashboard_{theme.lower()}.png', 1)
    page.theme('Light')

    page.press('Stop and save')
    stopped = int(page.see(r'stopped at step (\d+) of 240', 1, seconds=90)[1])
    page.settled(1)
    page.see('Where is the piano', 1) # the talk stays too

    again = page.run('live.go_on()')
    page.see('Training', again, seconds=120)
    assert stopped<beyond(page, again, 240, stopped)<240
    last = page.run('live.stop(); live.wait(); live.board.phase')
    page.see("'stopped'", last, seconds=90)
    page.see('stopped at step', again)
    nothing_wrong(page)


def test_buttons_work_while_a_cell_awaits_the_run(root, visit, opens, tmp_path, images):
    "And what stays is there without a kernel, without trust, and in what nbconvert makes of the notebook"
    lab.notebook(root/'await.ipynb', setup.replace('{steps}', '40'), f'live = train_live(run, {prompts})', 'result = await live\nresult.steps')
    page = visit('await.ipynb')
    page.see('Training', 1, seconds=180)
    page.press('Pause'); page.see('Paused', 1)
    page.press('Go on'); page.see('Training', 1)
    page.see('40', 2, seconds=120); page.finished()
    page.see('Done', 1); page.settled(1)
    page.save(); nothing_wrong(page)
    stays(root/'await.ipynb')
    reopened(root, opens, tmp_path, images)
    converted(root/'await.ipynb', opens, tmp_path)


def stays(path):
    "The cell holds a picture and a page, and no widget"
    outputs = nbformat.read(path, 4).cells[1].outputs
    assert [sorted(o.data) for o in outputs]==[['image/png', 'text/plain'], ['text/html', 'text/plain']]
    page = outputs[1].data['text/html']
    assert all(w in page for w in ('40 of 40', 'Where is the microscope?', 'Tell me where the kettle is.', 'held-out loss'))


def sees_the_run(page):
    "A picture that is drawn, a table of figures, the answers"
    area = page.locator('.jp-OutputArea-output, .jp-OutputArea-child')
    assert area.locator('img').first.evaluate('e => [e.complete, e.naturalWidth > 300]')==[True, True]
    text = '\n'.join(area.all_inner_texts())
    assert all(w in text for w in ('40 of 40', 'Where is the microscope?', 'Tell me where the kettle is.', 'held-out loss')), text
    assert '█'*16 in text, 'the bar of a finished run is not full'
    assert 'Error displaying widget' not in text and 'Loading widget' not in text


def reopened(root, opens, tmp_path, images):
    "By a JupyterLab that has no kernel and does not trust the notebook"
    with lab.server(root, tmp_path/'other', kernels=False) as address:
        page = opens(address, 'await.ipynb', run=False)
        sees_the_run(page.page)
        page.picture(images/'dashboard_left_behind.png', 1)
        assert page.strangers==[]


def converted(path, opens, tmp_path):
    subprocess.run([sys.executable, '-m', 'nbconvert', '--to', 'html', '--output-dir', str(tmp_path), '--output', 'page.html', str(path)], check=True, capture_output=True)
    page = opens.empty()
    page.route('**/*', lambda r: r.continue_() if r.request.url.startswith(('file:', 'data:')) else r.abort())
    page.goto((tmp_path/'page.html').as_uri(), wait_until='domcontentloaded')
    sees_the_run(page)


def test_without_ipywidgets_one_page_is_replaced_in_place(root, visit):
    hidden = "import sys\nsys.modules['ipywidgets'] = None\n"+setup.replace('{steps}', '60')
    lab.notebook(root/'plain.ipynb', hidden, f'live = train_live(run, {prompts})')
    page = visit('plain.ipynb')
    page.see('without ipywidgets there are no buttons', 1, seconds=180)
    assert page.cell(1).locator('.jupyter-button').count()==0
    beyond(page, 1, 60, 3)
    drawn = page.cell(1).locator('polyline').first.get_attribute('points').count(',')
    at = page.run('live.pause()'); page.see('Paused', 1)
    assert page.cell(1).locator('polyline').first.get_attribute('points').count(',')>=drawn>=3
    page.run('live.go_on()'); page.run('live.wait().steps'); page.see('60', at+2, seconds=120)
    page.see('Done', 1); page.see('60 of 60', 1); page.settled(1)
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
