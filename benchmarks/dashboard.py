"""What the dashboard costs: `python benchmarks/dashboard.py [--seconds N] [--out FILE.json]`

One run in a real Jupyter kernel, with its widgets shown; every few seconds the dashboard is switched off or on, so that
both halves share the machine, the model and the rows, which are all of one length. The cost is how much more processor
time (of all threads) a step takes while it is on; the clock on the wall is given as well, but other work on the machine
moves it. Drawing for one second of a fast run and the answers to fixed prompts are measured by themselves. Then a board
is fed ten thousand steps and a million, and its memory compared.
"""
import argparse, json, os, platform
from datetime import date
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

in_kernel = '''
import json, os, sys, tempfile, time
from pathlib import Path
import torch
from sage_finetune.config import TrainingConfig
from sage_finetune.ui import live as module
from sage_finetune.ui.live import LiveCallback, LiveRun, show_live
from sage_finetune.rows.sources import save_rows
torch.set_num_threads({threads})
folder,length = Path(tempfile.mkdtemp()),{seconds}
question = lambda i: dict(question=f'What is {{100+i}} plus {{200+i}}?',
                          answer=f'It is {{300+2*i}}, and that is certain.')
config = TrainingConfig(
    model_name='sage-tiny', data_path=save_rows(folder/'rows.jsonl', [question(i) for i in range(400)]),
    output_dir=folder/'run', max_steps=100_000, per_device_train_batch_size=16, gradient_accumulation_steps=1,
    learning_rate=1e-4, logging_steps=10, save_steps=100_000, report_to='none', test_size=0.05, eval_steps=100_000)

class Switched(LiveCallback):
    "On and off by turns; adds up what each half took"
    block = 5.0
    def __init__(self, live):
        super().__init__(live)
        self.on,self.took,self.mark,self.began = True,{{True: [0, 0.0, 0.0], False: [0, 0.0, 0.0]}},None,None

    def on_step_begin(self, args, state, control, **kw):
        now = time.perf_counter(),time.process_time()
        if self.mark and state.global_step>20:
            spent = 1,now[0]-self.mark[0],now[1]-self.mark[1]
            self.took[self.on] = [a+b for a,b in zip(self.took[self.on], spent)]
        if state.global_step==20: self.began = self.turned = now[0]
        if self.began and now[0]-self.turned>self.block: self.on,self.turned = not self.on,now[0]
        if self.began and now[0]-self.began>length: self.live.stop()
        self.mark = now
        if self.on: super().on_step_begin(args, state, control, **kw)

    def on_pre_optimizer_step(self, *args, **kw): self.on and super().on_pre_optimizer_step(*args, **kw)
    def on_step_end(self, *args, **kw): self.on and super().on_step_end(*args, **kw)
    def on_log(self, *args, **kw): self.on and super().on_log(*args, **kw)

def run(prompts, kind):
    live,made = LiveRun(config.replace(output_dir=folder/kind), prompts),[]
    live.callbacks = lambda: [made.append(Switched(live)) or made[-1]]
    live.start()
    show_live(live, again=True)
    return live,made
'''

dashboard = '''
live,made = run([], 'dashboard')
while live.running: time.sleep(.5)
(on,on_wall,on_cpu),(off,off_wall,off_cpu) = made[0].took[True],made[0].took[False]
from sage_finetune.ui.board import board_panes
began = time.process_time()
for _ in range(20):
    for pane in board_panes.values(): pane(live.board)
print('RESULT', json.dumps(dict(
    steps_on=on, steps_off=off, more_processor_time=round(on_cpu/on/(off_cpu/off)-1, 4),
    more_wall_time=round(on_wall/on/(off_wall/off)-1, 4),
    drawing_ms=round((time.process_time()-began)/20*1000, 2), step_ms=round(off_wall/off*1000, 1))))
'''

answers = '''
Switched.block,spent = 1e9,[]
prompts = ['What is 12 plus 30?', 'What is 150 plus 250?']
before = module._answer_prompts
def timed(live, step):
    began = time.monotonic()
    before(live, step)
    spent.append((step, time.monotonic()-began, module._training_seconds(live)))
module._answer_prompts = timed
live,made = run(prompts, 'answers')
while live.running: time.sleep(.5)
between,trained = sum(s for _,s,_ in spent[1:]),max(1e-9, module._training_seconds(live))
print('RESULT', json.dumps(dict(rounds_of_answers=len(spent), share_of_time=round(between/trained, 4),
                                seconds_of_one=round(sum(s for _,s,_ in spent)/len(spent), 3))))
'''


def measured(code_blocks, seconds):
    "What blocks of code print as results, run in a kernel of their own"
    from jupyter_client import KernelManager
    manager = KernelManager(kernel_name='python3')
    manager.start_kernel(extra_arguments=['--log-level=ERROR'])
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    found,printed = {}, []
    def hear(m):
        if m['msg_type']=='error': raise SystemExit('\n'.join(m['content']['traceback']))
        if m['msg_type']=='stream': printed.append(m['content']['text'])
    try:
        for code in code_blocks: client.execute_interactive(code, timeout=20*seconds+300, output_hook=hear)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    for line in ''.join(printed).splitlines():
        if line.startswith('RESULT '): found |= json.loads(line[7:])
    return found


def memory():
    "Bytes that a board holds after ten thousand and after a million steps, and the characters of its curve"
    import tracemalloc
    from sage_finetune.ui.board import Board, curve_svg, SampledAnswer
    tracemalloc.start()
    board,out = Board(['What?']),{}
    for step in range(1, 1_000_001):
        board.loss.add(step, 1/step)
        board.rate.add(step, 1e-4)
        if step%100==0:
            board.held_out.add(step, 1/step)
            board.add_answer('What?', SampledAnswer(step, step, f'At step {step}.'))
        board.update(step=step, done=step)
        if step in (10_000, 1_000_000):
            out[f'bytes_after_{step:,}_steps'] = tracemalloc.get_traced_memory()[0]
            out[f'svg_after_{step:,}_steps'] = len(curve_svg(board))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=int, default=120, help='of training in each of the two runs')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--out')
    given = parser.parse_args()
    found = measured([in_kernel.format(seconds=given.seconds, threads=given.threads), dashboard, answers],
                     given.seconds) | memory()
    found |= dict(date=str(date.today()),
                  machine=f'{os.cpu_count()} cores of {platform.machine()}, {given.threads} threads')
    print(json.dumps(found, indent=2))
    if given.out: Path(given.out).write_text(json.dumps(found, indent=2)+'\n')


if __name__=='__main__': main()
