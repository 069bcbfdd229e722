"""A fault at every moment of writing, in every command: no wrong result, no lost work, one line that names it, and the
same command goes on to the same bits

`make test-faults` tries them all and prints the table; `make test` tries a few of each.
"""
import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from inject import Injector, modes
from quick import forked, two_layers
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.machine import goes_on
from sage_finetune.core.run_folder import write_meta
from sage_finetune.rows.formats import create_sample_data

pytestmark = pytest.mark.skipif(forked is None, reason='needs processes as POSIX has them')

commands = dict(train=['run', 'run'], merge=['merge', 'run'], clean=['clean', 'run', '--force'],
                export=['export', 'run', '--output', 'out'],
                export_adapter=['export', 'run', '--adapter', '--output', 'out', '--base', 'someone/base'])
done = ('stopped after the last step; the run is complete|stopped; nothing more was done|'
        'and the same command begins again')
stops = dict(SIGINT=130, SIGTERM=143, SIGHUP=129) # Mode → exit status
begins_with = dict(train='asked', merge='trained', clean='merged', export='merged', export_adapter='merged')


def _in_process(room, words, mode, at, said):
    "The command line, with a fault in it; writes what was said and how many moments there were"
    for name in [n for n in sys.modules if n.partition('.')[0]=='sage_finetune']: del sys.modules[name]
    os.environ.update(HOME=str(room/'home'), SAGE_CACHE=str(room/'cache'), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    os.chdir(room)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    handle = os.open(said, os.O_WRONLY)
    for number in (1, 2): os.dup2(handle, number)
    sys.stdout,sys.stderr = (open(n, 'w', closefd=False, encoding='utf-8') for n in (1, 2))
    sys.argv = ['sage-finetune', *words]
    gc.freeze()
    from sage_finetune.cli import main
    import sage_finetune.trainer, sage_finetune.merge_chat # what is imported later is no moment of the command
    injector = Injector(room, mode, at).begin()
    try: status = main()
    except SystemExit as e: status = e.code
    injector.mode = None
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdout.flush()
    sys.stderr.flush()
    Path(f'{said}.moments').write_text(str(injector.seen))
    os._exit(status if isinstance(status, int) else int(status is not None))


def command(room, words, mode=None, at=0):
    "(status, what was said, moments of writing) of a command"
    said = room.parent/f'{room.name}.said'
    for old in room.parent.glob(f'{room.name}.said*'): old.unlink()
    os.mkfifo(said) # a pipe, which is written to where no file can be
    reader,heard,end = os.open(said, os.O_RDONLY | os.O_NONBLOCK), b'', time.monotonic()+240
    process = forked.Process(target=_in_process, args=(room, words, mode, at, said))
    process.start()
    while True:
        over = not process.is_alive()
        with suppress(BlockingIOError):
            while new := os.read(reader, 2**16): heard += new
        if over: break
        assert time.monotonic()<end, 'it hangs'
        time.sleep(.02)
    os.close(reader)
    process.join()
    counted = Path(f'{said}.moments')
    moments = int(counted.read_text()) if counted.is_file() else 0
    return process.exitcode,heard.decode(errors='replace'), moments


@pytest.fixture(scope='module')
def states(tmp_path_factory):
    "Rooms as they are before a command, and the moments of each command without a fault"
    asked = tmp_path_factory.mktemp('faults')/'asked'
    (asked/'home').mkdir(parents=True)
    data = create_sample_data(asked/'rows.jsonl', 'qa', num_samples=24)
    config = TrainingConfig(model_name=two_layers, data_path='rows.jsonl', output_dir='run', test_size=0.25,
                            max_steps=4, save_steps=2, eval_steps=2, logging_steps=1, per_device_train_batch_size=4,
                            gradient_accumulation_steps=1, learning_rate=5e-3, report_to='none', load_in_8bit=False,
                            fp16=False, lora=LoRAConfig(r=4, lora_dropout=0.1))
    write_meta(asked/'run', two_layers, data, task_type='qa', config=config)
    (asked/'run'/'mine.txt').write_text('not of the package')
    moments = {}
    for name,before,after in (('train', 'asked', 'trained'), ('merge', 'trained', 'merged')):
        shutil.copytree(asked.parent/before, asked.parent/after)
        status,said,moments[name] = command(asked.parent/after, commands[name])
        assert status==0, said
    for name in ('export', 'export_adapter', 'clean'):
        shutil.copytree(asked.parent/'merged', asked.parent/name)
        status,said,moments[name] = command(asked.parent/name, commands[name])
        assert status==0, said
    return asked.parent,moments


def weights(folder): # {file: its bytes}
    "Every weight below a folder that a command is to bring about"
    places = [folder/'run'/'lora_weights', folder/'run'/'merged_model', folder/'out']
    return {str(p.relative_to(folder)): p.read_bytes() for place in places for p in place.rglob('*.safetensors')}


def results(folder): # {file: content}
    "What a run came to"
    files = [folder/'run'/n for n in ('training_results.json', 'mine.txt')]
    found = {f.name: f.read_text() for f in files if f.is_file()}
    if 'training_results.json' in found:
        found['training_results.json'] = {k: v for k,v in json.loads(found['training_results.json']).items()
                                          if 'second' not in k and 'memory' not in k}
    return found


def one_fault(room, states, name, mode, at):
    "What comes of one fault, and of the same command afterwards: 'survived', or what is wrong"
    folder,_ = states
    shutil.copytree(folder/begins_with[name], room)
    before = weights(room)
    status,said,_ = command(room, commands[name], mode, at)
    if 'Traceback' in said: return f'traceback: {said[-600:]}'
    if mode=='clock' and status: return f'the clock matters: {said[-600:]}'
    if mode in stops and status not in (0, stops[mode]): return f'status {status}: {said[-300:]}'
    if mode in stops and status and not (name!='clean' and goes_on in said or re.search(done, said)):
        return f'no word of where it stopped: {said[-300:]}'
    if mode in ('denied', 'full', 'half') and status and 'error: ' not in said: return f'no word of it: {said[-300:]}'
    if name!='clean' and any(weights(room).get(k)!=v for k,v in before.items()): return 'work is lost'
    wanted = folder/(name if name not in ('train', 'merge') else dict(train='trained', merge='merged')[name])
    if mode!='dies' and not status and weights(room)!=weights(wanted): return 'a wrong result, said to be right'
    status,said,_ = command(room, commands[name])
    # what is not of a run stays, and perhaps the lock, where it was its removal that failed
    gone = name=='clean' and {p.name for p in (room/'run').iterdir()}-{'.lock'}=={'mine.txt'}
    if status and not gone: return f'does not go on: {said[-600:]}'
    if weights(room)!=weights(wanted): return 'another result afterwards'
    if name!='clean' and results(room)!=results(wanted): return f'other figures afterwards: {results(room)}'
    left = [str(p.relative_to(room)) for p in room.rglob('.*') if p.name!='.lock' and 'home' not in p.parts]
    return f'left behind: {left}' if left else 'survived'


few = [(name, mode, share) for name in commands
       for mode,share in (('full', .3), ('half', .6), ('dies', .8), ('denied', .95), ('SIGTERM', .5))]


@pytest.mark.parametrize('name,mode,share', few)
def test_a_fault_is_survived(states, tmp_path, name, mode, share):
    moments = states[1][name]
    assert moments>5
    assert one_fault(tmp_path/'room', states, name, mode, max(1, round(share*moments)))=='survived'


@pytest.mark.slow
@pytest.mark.parametrize('name', commands)
def test_every_fault_is_survived(states, tmp_path, capsys, name):
    survived,found = Counter(),[]
    for mode in modes:
        for at in range(1, states[1][name]+1):
            room = tmp_path/f'{mode}{at}'
            outcome = one_fault(room, states, name, mode, at)
            if outcome=='survived': survived[mode] += 1
            else: found.append((mode, at, outcome))
            shutil.rmtree(room)
    with capsys.disabled():
        print(f'\n{name:16}', *(f'{m} {survived[m]} of {states[1][name]}' for m in modes))
        for f in found: print('  ', *f)
    assert not found
