"""Dashboard, form and chat in a real kernel, with the messages that a page sends: with whatever ipykernel and
ipywidgets are installed, and (slow) with the versions of Google Colab, whose kernel reads nothing while a cell awaits
"""
import re
import sys

import pytest

pytest.importorskip('ipykernel', reason='needs a kernel')
import kernel

setup = '''
import os, tempfile, time, asyncio
from pathlib import Path
from transformers import TrainerCallback
from sage_finetune.config import TrainingConfig
from sage_finetune.core.machine import Machine
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer
from sage_finetune.ui.form import choose_config
from sage_finetune.ui.live import train_live

class Rest(TrainerCallback): # so that a fast machine leaves time for the buttons
    def on_step_end(self, args, state, control, **kwargs): time.sleep(.05)

class Slowly(LoRATrainer):
    def callbacks(self): return [*super().callbacks(), Rest()]

folder = Path.cwd()
data = create_sample_data(folder/'sums.jsonl', 'qa', num_samples=48)
def config(name, **more):
    return TrainingConfig(**dict(model_name='sage-tiny', data_path=data, output_dir=folder/name, test_size=0.1,
                                 max_steps=400, save_steps=5, per_device_train_batch_size=4, report_to='none',
                                 gradient_accumulation_steps=1, learning_rate=5e-3, logging_steps=5) | more)
'''


@pytest.fixture(scope='module', params=['installed', pytest.param('colab', marks=pytest.mark.slow)])
def python(request, tmp_path_factory):
    if request.param=='installed': return sys.executable
    made = kernel.colab_python(tmp_path_factory.mktemp('colab')/'python')
    return made or pytest.skip("Colab's ipykernel could not be installed; SAGE_COLAB_PYTHON names a Python that has it")


@pytest.fixture(scope='module')
def opened(python, tmp_path_factory):
    page = kernel.Page(tmp_path_factory.mktemp('page'), python)
    page.run(setup)
    page.ipykernel,page.ipywidgets = versions(page)
    yield page
    page.close()


@pytest.fixture
def page(opened):
    "One page for all tests; what a test that failed has left running is broken off"
    yield opened
    opened.interrupt()


def versions(page):
    "Of ipykernel and ipywidgets, as numbers of their releases"
    said = page.text(page.run("import ipykernel, ipywidgets\nprint(ipykernel.__version__, ipywidgets.__version__)"))
    return [int(v.split('.')[0]) for v in said.split()]


def answered(page, message):
    "Whether a page hears that a message was handled; ipykernel 7 says so in subshells only, which JupyterLab uses"
    return page.ipykernel>6 or message in page.idle


def all_steps(page, cell):
    "As every part of the page says it; the last line is made anew with each change, the others less often"
    return {*re.findall(r'([\d,]+) of 400', page.text(cell)), *re.findall(r'shows step ([\d,]+)', page.text(cell))}


def steps(page, cell): return int((re.search(r'([\d,]+) of 400', page.text(cell)) or ['', '-1'])[1])


@pytest.mark.slow # `make test-browser` presses them in JupyterLab
def test_the_buttons_act_while_a_cell_awaits_the_run(page):
    cell = page.run("live = train_live(Slowly(config('steered')), prompts=['What is 2 plus 4?'], every=20)")
    view = [o['data'] for o in page.outputs[cell] if kernel.VIEW in o.get('data', {})]
    assert len(view)==1 and len(page.below(view[0][kernel.VIEW]['model_id']))>8 # it has models for all its parts
    waits,after = page.send('result = await live\nprint("awaited", result)'),page.send('print("the next cell")')
    page.until(lambda: steps(page, cell)>=3, what='it trains')
    pressed = page.press('Pause')
    page.until(lambda: 'Paused' in page.text(cell), 20, 'paused by a button')
    page.until(lambda: answered(page, pressed), 10, 'the click was answered') # a page sends nothing more before that
    page.enter('Ask both, and press Enter', 'What is 30 plus 1?')
    answer = r'What is 30 plus 1\?\s+base\s+[^▌\s][^▌]*?tuned, step \d+\s+[^▌\s]'
    page.until(lambda: re.search(answer, page.text(cell)) and '▌' not in page.text(cell), 60, 'answers in the pause')
    page.tell(page.find(description='remember'), method='update', state=dict(value=True), buffer_paths=[])
    page.enter('Ask both, and press Enter', 'And 4 plus 1?')
    page.until(lambda: '2. And 4 plus 1?' in page.text(cell) and '▌' not in page.text(cell), 60, 'a second turn')
    assert page.text(cell).index('What is 30')<page.text(cell).index('2. And 4'), 'the newest is at the bottom'
    page.until(lambda: len(all_steps(page, cell))==1, 20, 'every part of the page shows the same step')
    still = steps(page, cell)
    page.rest(2)
    assert steps(page, cell)==still
    page.press('Go on')
    page.until(lambda: steps(page, cell)>still, 20, 'it goes on')
    assert waits not in page.replies and after not in page.replies, 'cells have kept their order'
    page.press('Stop and save')
    page.until(lambda: page.ended(after), 60, 'the cells that waited')
    assert 'awaited None' in page.text(waits) and 'the next cell' in page.text(after)
    page.until(lambda: 'Stopped: stopped at step' in page.text(cell), 20, 'what is left')
    assert kernel.VIEW not in str(page.outputs[cell]), 'the widgets have made room'
    assert '2. And 4 plus 1?' in page.text(cell), 'the talk stays'


@pytest.mark.slow
def test_a_cell_that_awaits_can_be_interrupted_and_the_run_goes_on(page):
    cell = page.run("live = train_live(Slowly(config('interrupted')))")
    waits = page.send('await live')
    page.until(lambda: steps(page, cell)>=2, what='it trains')
    pressed = page.press('Pause')
    page.until(lambda: answered(page, pressed) and 'Paused' in page.text(cell), 20, 'the button')
    page.press('Go on')
    page.until(lambda: 'Training' in page.text(cell), 20, 'it goes on')
    page.manager.interrupt_kernel()
    page.until(lambda: page.ended(waits), 20, 'the cell has ended')
    assert page.replies[waits]['status']=='error'
    now = steps(page, cell)
    page.until(lambda: steps(page, cell)>now, 20, 'the run goes on')
    page.run('live.stop()\nlive.wait()')


@pytest.mark.slow
def test_a_page_that_is_loaded_again_during_an_await_is_answered(page):
    if page.ipykernel>6: pytest.skip('ipykernel 7 does this by itself, in subshells')
    cell = page.run("live = train_live(Slowly(config('again')))")
    waits = page.send('await live')
    page.until(lambda: steps(page, cell)>=1, what='it trains')
    asks = [page.client.kernel_info(), page.client.comm_info('jupyter.widget')]
    page.until(lambda: {*asks}<={*page.replies}, 20, 'answers during the await')
    assert page.find(description='Pause') in page.replies[asks[1]]['comms'] and waits not in page.replies
    button = page.find(description='Pause')
    page.widgets[button]['icon'] = 'forgotten'
    page.tell(button, method='request_state')
    page.until(lambda: page.widgets[button]['icon']=='pause', 20, 'the state of a widget')
    page.press('Stop and save')
    page.until(lambda: page.ended(waits), 60, 'stopped')


@pytest.mark.slow
def test_outputs_of_a_cell_that_awaits_stay_its_own(page):
    "A click changes nothing of where the cell prints"
    cell = page.run("live = train_live(Slowly(config('prints')))")
    waits = page.send("from sage_finetune.core.display import handle_widgets\n"
                      "while not live._hold:\n    await handle_widgets()\n    await asyncio.sleep(.05)\n"
                      "print('after the click')\nlive.stop()\nawait live")
    page.until(lambda: steps(page, cell)>=1, what='it trains')
    page.press('Pause')
    page.until(lambda: page.ended(waits), 60, 'seen by the cell')
    assert page.text(waits).count('after the click')==1


def test_the_form_is_filled_in(page):
    cell = page.run("card = Machine('cuda', 'Tesla T4', memory=int(14.75*2**30))\n"
                    "form = choose_config('sage-tiny', data, machine=card)\nform")
    page.until(lambda: 'fits:' in page.text(cell), 60, 'the memory of a step')
    page.tell(page.find(description='epochs'), method='update', state=dict(value='forty'), buffer_paths=[])
    page.until(lambda: "must be a" in page.text(cell) and "'forty'" in page.text(cell), 20, 'a refusal')
    page.tell(page.find(description='epochs'), method='update', state=dict(value='40'), buffer_paths=[])
    page.until(lambda: 'num_train_epochs=40' in page.text(cell), 20, 'the code')
    page.press('minimal')
    page.until(lambda: 'PresetConfigs.minimal(' in page.text(cell), 20, 'a preset')
    page.press('Keep')
    page.until(lambda: kernel.VIEW not in str(page.outputs[cell]), 20, 'the form is kept')
    assert 'Settings, from the preset minimal' in page.text(cell)


@pytest.mark.slow
def test_two_models_are_asked_with_a_slider(page):
    page.run("LoRATrainer(config('short', max_steps=5), quiet=True).train()")
    cell = page.run("from sage_finetune.ui.talk import talk\ntalk(folder/'short', max_new_tokens=8)")
    page.until(lambda: page.find(description='strength'), 60, 'a slider')
    page.enter('Ask both, and press Enter', 'What is 2 plus 4?')
    page.until(lambda: re.search(r'tuned\s+\S', page.text(cell)) and '▌' not in page.text(cell), 60, 'two answers')
    page.tell(page.find(description='strength'), method='update', state=dict(value=.5), buffer_paths=[])
    page.until(lambda: 'tuned × 0.5' in page.text(cell), 60, 'another strength')


@pytest.mark.slow
def test_a_kernel_that_dies_leaves_a_page_that_says_what_was_saved(python, tmp_path):
    page = kernel.Page(tmp_path, python)
    page.run(setup)
    cell = page.run("live = train_live(Slowly(config('killed')))")
    saved = lambda: [o['data']['text/plain'] for o in page.outputs[cell]
                     if 'data' in o and kernel.VIEW not in o['data']]
    page.until(lambda: 'holds checkpoint' in ''.join(saved()), 90, 'what the saved page says')
    shown = page.text(cell)
    assert shown.count('If its kernel is gone')==2 # beside the widgets, and below them in the saved page
    page.kill()
    step = int(re.search(r'holds checkpoint (\d+)', saved()[0])[1])
    assert step>=5 and str(tmp_path/'killed') in saved()[0] and '`train_live`' in saved()[0]

    page = kernel.Page(tmp_path, python)
    page.run(setup)
    cell = page.run("said = []\nclass Noted(Slowly):\n    def say(self, what): said.append(str(what))\n"
                    "live = train_live(Noted(config('killed', max_steps=400)))\n"
                    "while live.board.step<1 and live.running: await asyncio.sleep(.05)\n"
                    "first = live.board.step\nlive.stop()\nlive.wait()\nprint('continued at', first)")
    assert int(re.search(r'continued at (\d+)', page.text(cell))[1])>=step
    page.close()


def test_on_colab_it_is_asked_for_the_widgets_of_ipywidgets_8(page):
    "Colab's `output` is played here; whether it is called depends on the version that is installed"
    cell = page.run("import sys, types\nasked = []\ncolab = types.ModuleType('google.colab')\n"
                    "colab.output = types.SimpleNamespace(enable_custom_widget_manager=lambda: asked.append(1))\n"
                    "sys.modules['google.colab'] = colab\nform = choose_config('sage-tiny', data, machine=card)\n"
                    "display(form)\ndel sys.modules['google.colab']\nprint('asked', len(asked))")
    assert f'asked {int(page.ipywidgets>7)}' in page.text(cell)
