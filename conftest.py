"Each notebook under `nbs` is one test, run by nbdev's own runner, so one `pytest` covers notebooks and `tests/`"
import atexit, contextlib, gc, os, shutil, signal, sys, tempfile
from unittest import mock

import pytest

# The suite needs no network: an attempt to reach a hub fails at once instead of waiting. Set before anything is
# imported.
os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1', DO_NOT_TRACK='1',
                  TOKENIZERS_PARALLELISM='false', WANDB_MODE='disabled')

# Prepared data is kept between runs of the program, not between tests
if 'SAGE_CACHE' not in os.environ:
    os.environ['SAGE_CACHE'] = tempfile.mkdtemp(prefix='sage_cache_')
    atexit.register(shutil.rmtree, os.environ['SAGE_CACHE'], ignore_errors=True)
# What several workers use is made once
if 'SAGE_TESTS' not in os.environ:
    os.environ['SAGE_TESTS'] = tempfile.mkdtemp(prefix='sage_tests_')
    atexit.register(shutil.rmtree, os.environ['SAGE_TESTS'], ignore_errors=True)

# A shell starts what runs in its background with Ctrl-C ignored, `nohup` ignores SIGHUP, and tests inherit that; some
# of them send these signals
if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None): signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP)==signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'tests'))
import cheaper

config = get_config(os.path.dirname(os.path.abspath(__file__)))


def pytest_addoption(parser):
    parser.addoption('--nb-flags', default='', help='run cells with these flags too, e.g. "slow cuda"')


def is_lesson(path):
    "Whether `path` is a notebook of the project: not a checkpoint, a draft (`_name`) or in a folder marked `.notest`"
    if path.suffix != '.ipynb' or not path.is_relative_to(config.nbs_path): return False
    hidden = any(part[0] in '_.' for part in path.relative_to(config.nbs_path).parts)
    return not hidden and not (path.parent/'.notest').exists()


# The files that take longest come first, the longest of them at the very beginning, so that two workers are both busy
# to the end
LONG = ('test_resume', 'test_merging', 'test_memory', 'test_faults', 'test_merging_kinds', 'test_adapter', 'test_loop',
        'test_processes', 'test_serve', '02_trainer', 'test_tiny_vision', 'test_pipeline', 'test_live', 'test_cli',
        'test_tasks', '04_tasks', '04_preference', '08_a_second_task', 'test_preference', '05_memory', 'test_sources',
        '07_live', 'test_loss', '05_qlora_on_a_small_card', '04_how_much_rank', '04_step_bytes', 'test_public_contract',
        'test_incremental', '03_merging', '03_your_own_trainer', '01_first_run', 'test_token_losses', 'test_pages',
        '02_what_it_learns', 'test_split', '06_your_codebase', 'test_contract', '03_form', 'test_merge_chat')


def pytest_collection_modifyitems(items):
    last = len(LONG)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else last)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The objects of libraries live as long as the process: a collection, which each run asks for, need not walk them

    Done where a file begins, when nothing of the file before is alive.
    """
    if item.path!=getattr(pytest_runtest_setup, 'path', None):
        gc.collect()
        gc.freeze()
    pytest_runtest_setup.path = item.path


def pytest_collect_file(file_path, parent):
    if is_lesson(file_path): return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self): yield NotebookItem.from_parent(self, name=self.path.stem)


DRAWN = '01_display', '03_callbacks', '02_trainer', '05_cli' # lessons whose curve of losses is drawn
# Lessons of a trained run, which several of them train alike before they begin
OF_A_RUN = ('03_merge_chat', '00_generate', '02_exam', '04_merging', '04_adapter_sizes', '05_token_losses', '06_talk')


class NotebookFailed(Exception): "A cell raised; the runner has already written its traceback to stderr"


class NotebookItem(pytest.Item):
    def runtest(self):
        flags = self.config.getoption('--nb-flags').split()
        passed,seconds = self._isolated(run_notebook, self.path, skip_flags=config.tst_flags.split(), force_flags=flags,
                                        basepath=config.config_path, cell_timeout=config.cell_timeout)
        if not passed: raise NotebookFailed(self.path.name)
        if not seconds: pytest.skip('marked `skip_exec`')  # the runner gives 0 seconds for a notebook it did not run

    @staticmethod
    def _isolated(run, *args, **kwargs):
        "Call `run`, then put back what a notebook may leave changed: environment, import path, folder, Ctrl-C"
        before_path,before_folder,before_interrupt = sys.path[:],os.getcwd(),signal.getsignal(signal.SIGINT)
        name,same = args[0].stem,contextlib.nullcontext()
        curve = same if name in DRAWN else cheaper.without_curve()
        first = cheaper.first_run_once() if name in OF_A_RUN else same
        try:
            with mock.patch.dict(os.environ), curve, first: return run(*args, **kwargs)
        finally:
            sys.path[:] = before_path
            os.chdir(before_folder)
            signal.signal(signal.SIGINT, before_interrupt)
            gc.collect()  # models that the notebook loaded, before the next one loads its own

    def repr_failure(self, excinfo):
        if excinfo.errisinstance(NotebookFailed):
            return f'{excinfo.value}: see the traceback of the failing cell in the captured stderr'
        return super().repr_failure(excinfo)

    def reportinfo(self): return self.path,None,f'notebook {self.path.relative_to(config.config_path)}'
