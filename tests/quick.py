"""What makes many tests quick: a model with few layers, and processes that need not import the libraries again

A process of its own is forked from one that has imported everything, where a new interpreter would take five seconds
to come as far.
"""
import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sage_finetune.config import resolve_model

forked = multiprocessing.get_context('forkserver') if os.name=='posix' else None
if forked:
    forked.set_forkserver_preload([
        'sage_finetune.trainer', 'sage_finetune.merge_chat', 'sage_finetune.runs.launch',
        'sage_finetune.runs.pipeline', 'sage_finetune.cli', 'datasets', 'transformers.models.qwen2.modeling_qwen2',
        'transformers.models.qwen2.tokenization_qwen2', 'peft.tuners.lora.bnb', 'matplotlib.figure',
        'matplotlib.legend', 'matplotlib.backends.backend_agg', 'PIL.PngImagePlugin', 'pytest'])


def _two_layers():
    "The embedded model without its last four layers: it learns as fast, and a step takes a third of the time"
    from safetensors.numpy import load_file, save_file
    folder,source = Path(os.environ['SAGE_TESTS'])/'two_layers', Path(resolve_model('sage-tiny'))
    if folder.is_dir(): return folder
    temp = Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.copytree(source, temp, dirs_exist_ok=True)
    config = json.loads((source/'config.json').read_text())
    short = dict(num_hidden_layers=2, layer_types=config['layer_types'][:2])
    (temp/'config.json').write_text(json.dumps(config | short, indent=2))
    weights = load_file(source/'model.safetensors')
    kept = {k: v for k,v in weights.items() if '.layers.' not in k or k.split('.')[2] in ('0', '1')}
    save_file(kept, temp/'model.safetensors', metadata=dict(format='pt'))
    try: temp.rename(folder)
    except OSError: shutil.rmtree(temp) # another worker was first
    return folder

two_layers = str(_two_layers())


def _as_new(files, words, folder, env):
    "What a new interpreter does with a command line: it imports the package, and has files of its own"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for name in [n for n in sys.modules if n.partition('.')[0]=='sage_finetune']: del sys.modules[name]
    for number,path in enumerate(files):
        handle = os.open(path, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin,sys.stdout,sys.stderr = (open(n, 'w' if n else 'r', closefd=False, encoding='utf-8') for n in range(3))
    sys.argv = ['sage-finetune', *words]
    gc.freeze() # so that no collection walks through the libraries
    from sage_finetune.cli import main
    sys.exit(main())


def command_in_fork(words, folder, env=None, stdin='', terminal=None, within=300):
    """`sage-finetune` in a forked process; a finished process as `subprocess.run` gives it

    With `terminal`, a device, both its outputs go there.
    """
    words,env = [str(w) for w in words], dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as temp:
        files = [Path(temp)/name for name in ('stdin', 'stdout', 'stderr')]
        for file in files: file.write_text(stdin if file.name=='stdin' else '', encoding='utf-8')
        used = [files[0], terminal, terminal] if terminal else files
        process = forked.Process(target=_as_new, args=(used, words, folder, env))
        process.start()
        process.join(within)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, within)
        said = [file.read_text(encoding='utf-8') for file in files[1:]]
    return subprocess.CompletedProcess(words, process.exitcode, *said)
