"What somebody sees who calls `train()` in a cell, with no dashboard asked for, on a wide page and on a narrow one"
import lab

cells = ('''from sage_finetune import LoRAConfig, LoRATrainer, TrainingConfig
from sage_finetune.rows.formats import create_sample_data
trainer = LoRATrainer(TrainingConfig(
    model_name='sage-tiny', data_path=create_sample_data('sums.json', 'qa', 60), max_length=64, test_size=0.2,
    per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=120, eval_steps=20, logging_steps=10,
    learning_rate=5e-3, report_to='none', output_dir='runs/sums', lora=LoRAConfig(r=8)))''',
         'trainer', 'result = trainer.train()', 'trainer', 'trainer.changes', 'trainer.machine')


def nothing_wrong(page): assert (page.faults(), page.strangers, page.wrong)==([], [], [])


def test_plain_training(root, visit, images):
    lab.notebook(root/'train.ipynb', *cells)
    page = visit('train.ipynb', run=None)
    page.run_cells(0, 2)
    page.see('LoRATrainer: nothing is prepared yet; `train\\(\\)` begins', 1, seconds=120)
    page.see(r'Training step \d+ of 120', 2, seconds=120)
    page.finished(240)
    page.see('Trained step 120 of 120', 2)
    text = page.shown(2)
    for word in ('training loss', 'held-out loss', 'gradient norm', 'tokens/s', 'epoch', 'so far', 'next', 'talk(',
                 ' merge ', ' compare '): assert word in text, word
    # a line is broken between its words; what is printed is not
    assert page.cell(2).locator('p', has_text='trained of').count()==1
    assert '│' not in text and '━━━' not in text, 'a table of letters'
    assert page.cell(2).locator('svg polyline').count()>=2
    page.run_cells(3, 5)
    page.finished(60)
    page.see('LoRATrainer: trained', 3)
    page.see('load_in_8bit', 4)
    page.see('main memory', 5)
    page.in_four_ways(images, train=2, trainer=3)
    assert [page.fits(i) for i in (1, 4, 5)]==[True]*3
    nothing_wrong(page)
