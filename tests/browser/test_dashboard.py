"The dashboard where there are no widgets, and where the run fails; how it is steered stands in test_tutorials"
import lab

setup = '''import tempfile, time
from pathlib import Path
from transformers import TrainerCallback
from sage_finetune.config import TrainingConfig
from sage_finetune.ui.live import train_live
from sage_finetune.rows.sources import save_rows
from sage_finetune.trainer import LoRATrainer

class Slowly(LoRATrainer):
    def callbacks(self): return [*super().callbacks(), Rest()]

class Rest(TrainerCallback): # so that a fast machine leaves time for the buttons
    seconds = .15
    def on_step_end(self, args, state, control, **kwargs): time.sleep(self.seconds)

folder = Path(tempfile.mkdtemp())
rooms = dict(microscope=12, printer=7, kettle=3, library=20, workshop=15, piano=9, archive=31, telescope=40,
             fridge=2, scanner=18)
ways = 'Where is the {}?', 'In which room do I find the {}?', 'Tell me where the {} is.', 'The {}: where?'
data = save_rows(folder/'rooms.jsonl', [dict(question=way.format(thing), answer=f'The {thing} is in room {room}.')
                                        for way in ways for thing,room in rooms.items()])
config = TrainingConfig(model_name='sage-tiny', data_path=data, output_dir=folder/'rooms', test_size=0.1,
                        max_steps={steps}, eval_steps=20, per_device_train_batch_size=8,
                        gradient_accumulation_steps=1, learning_rate=5e-3, logging_steps=5, report_to='none')
run = Slowly(config)'''
prompts = "prompts=['Where is the microscope?', 'Tell me where the kettle is.'], every=10, max_new_tokens=24"


def nothing_wrong(page): assert (page.faults(), page.strangers, page.wrong)==([], [], [])


def test_without_ipywidgets_one_page_is_replaced_in_place(root, visit):
    hidden = "import sys\nsys.modules['ipywidgets'] = None\n"+setup.replace('{steps}', '60')
    lab.notebook(root/'plain.ipynb', hidden, f'live = train_live(run, {prompts})')
    page = visit('plain.ipynb')
    page.see('without ipywidgets there are no buttons', 1, seconds=180)
    assert page.cell(1).locator('.jupyter-button').count()==0
    lab.beyond(page, 1, 60, 3)
    drawn = page.cell(1).locator('polyline').first.get_attribute('points').count(',')
    at = page.run('live.pause()')
    page.see('Paused', 1)
    assert page.cell(1).locator('polyline').first.get_attribute('points').count(',')>=drawn>=3
    page.run('live.go_on()')
    page.run('live.wait().steps')
    page.see('60', at+2, seconds=120)
    page.see('Done', 1)
    page.see('60 of 60', 1)
    page.settled(1)
    nothing_wrong(page)


def test_a_run_that_fails_says_so_in_its_place(root, visit):
    lab.notebook(root/'fails.ipynb', setup.replace('{steps}', '8'),
                 "class Cut(TrainerCallback):\n    def on_step_end(self, args, state, control, **kwargs):\n"
                 "        if state.global_step==3: raise RuntimeError('power cut')\n"
                 "class Unlucky(Slowly):\n    def callbacks(self): return [*super().callbacks(), Cut()]\n"
                 "live = train_live(Unlucky(config))")
    page = visit('fails.ipynb')
    page.see('Failed: RuntimeError: power cut', 1, seconds=180)
    at = page.run('try: live.wait()\nexcept RuntimeError as e: print(type(e).__name__, e)')
    page.see('RuntimeError power cut', at)
    nothing_wrong(page)
