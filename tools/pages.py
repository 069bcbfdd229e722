"Check that every notebook makes a documentation page: nbdev's processors run, Quarto is not needed"
import os, sys

from fastcore.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults


def fault(
    path, # The notebook
): # What stopped its page, or None
    "Process one notebook the way the site does"
    try: FilterDefaults()(read_nb(path))
    except Exception as error: return f'{type(error).__name__}: {error}'


def main(): # Exit status
    "Name each notebook and whether its page can be made"
    os.environ['IN_TEST'] = '1'  # a notebook's last cell must not export while its page is made
    config = get_config()
    os.chdir(config.config_path)
    faults = {path: fault(path) for path in nbglob(as_path=True).sorted()}
    for path,error in faults.items(): print(f'{path.relative_to(config.nbs_path)}: {error or "ok"}')
    return any(faults.values())


if __name__ == '__main__': sys.exit(main())
