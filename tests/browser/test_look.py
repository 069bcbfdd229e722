"What somebody sees who looks at a row and lays two runs side by side in JupyterLab"
import lab

train = '''from pathlib import Path
from sage_finetune.runs.run import Run, compare, runs
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.ui.token_losses import token_losses
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer

folder = Path('looked_at')
sums = create_sample_data(folder/'sums.json', 'qa', 60)
def train(name, r, learning_rate):
    LoRATrainer(TrainingConfig(
        model_name='sage-tiny', data_path=sums, max_length=64, test_size=0.2, per_device_train_batch_size=8,
        gradient_accumulation_steps=1, max_steps=40, eval_steps=5, logging_steps=2, learning_rate=learning_rate,
        report_to='none', output_dir=folder/name, lora=LoRAConfig(r=r)), quiet=True).train()
    return Run(folder/name)
large = train('large', 16, 5e-3)'''


def nothing_wrong(page): assert (page.faults(), page.strangers, page.wrong)==([], [], [])


def test_row_and_comparison(root, visit, images):
    lab.notebook(root/'look.ipynb', train+"\nsmall = train('small', 4, 2e-3)",
                 "token_losses(large.model, large.tokenizer, large.data[1][2], name='held-out row 2')",
                 'compare(small, large)', 'runs(folder)', 'large')
    page = visit('look.ipynb').finished(300)
    page.see(r'held-out row 2: loss \d\.\d+ → 0\.\d+ nats over \d+ learned; it fell for \d+; still above 1: \d', 1)
    assert 'before' not in page.shown(1), 'the table is shown and not the text'
    titles = page.cell(1).locator('span[title]')
    assert titles.filter(has_text='plus').count() or titles.count()>20
    assert '→' in titles.last.get_attribute('title')
    page.see(r'learning_rate\s*0\.002\s*0\.005', 2)
    page.see(r'steps\s*40\s*40', 2)
    assert page.cell(2).locator('img').count()==1
    page.see(r'large\s*custom\s*sage-tiny\s*trained', 3)
    page.see('large: trained', 4)
    page.in_four_ways(images, row=1, compare=2, runs=3)
    nothing_wrong(page)
