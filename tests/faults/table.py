"""Operations × faults, from the log of a suite: `python tests/faults/table.py LOG [benchmarks/README.md]`

The table takes the place of what stands between its marks in the file, else it is printed.
"""
import json
import platform
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from inject import modes

titles = dict(denied='no permission', full='full disk', half='cut short', dies='killed', clock='clock a day back',
              anywhen='a signal at any moment', export_adapter='export --adapter')
begin,end = '<!-- faults: begin -->', '<!-- faults: end -->'
bad = 'lost work', 'wrong result', 'silent'


def last_of(lines):
    "The last outcome of each point"
    return {(l['operation'], l['mode'], l['at']): l for l in lines}.values()


def cell(lines): return f'{sum(l["outcome"]=="survived" for l in lines)} of {len(lines)}' if lines else ''


def table(lines):
    lines = list(last_of(lines))
    alone,two = ([l for l in lines if (l['mode']=='two at once')==both] for both in (False, True))
    rows = list(dict.fromkeys(l['row'] for l in alone))
    out = [f"| | {' | '.join(titles.get(m, m) for m in modes)} |", '|---'*(len(modes)+1)+'|']
    for row in rows:
        cells = [cell([l for l in alone if l['row']==row and l['mode']==m]) for m in modes]
        out.append(f"| {titles.get(row, row)} | {' | '.join(cells)} |")
    out.append(f"| all | {' | '.join(cell([l for l in alone if l['mode']==m]) for m in modes)} |")
    if two:
        names = dict.fromkeys(l['row'] for l in two)
        words = [f'{n.replace("_", " ")} {cell([l for l in two if l["row"]==n])}' for n in names]
        out += ['', f'Two processes at once, the second while the first stands still at a moment: {", ".join(words)}.']
    counts = Counter(l['outcome'] for l in lines)
    other = sum(n for k,n in counts.items() if k not in ('survived', *bad))
    out += ['', f'{len(lines)} injected faults: {counts["survived"]} survived; '
            + ', '.join(f'{k} {counts[k]}' for k in bad) + f', other {other}. '
            f'{time.strftime("%Y-%m-%d")}, {machine()}; code {", ".join(sorted({l["code"] for l in lines}))}.']
    return '\n'.join(out)


def machine():
    cpu = next((l.partition(':')[2].strip() for l in Path('/proc/cpuinfo').read_text().splitlines()
                if l.startswith('model name')), platform.processor()) if Path('/proc/cpuinfo').is_file() else ''
    from importlib.metadata import version
    return f'{cpu or platform.machine()}, torch {version("torch")}'


def main(log, file=None):
    found = table([json.loads(line) for line in Path(log).read_text().splitlines()])
    if file is None: return print(found)
    text = Path(file).read_text(encoding='utf-8')
    put = re.sub(f'{begin}.*{end}', lambda m: f'{begin}\n{found}\n{end}', text, flags=re.S)
    Path(file).write_text(put, encoding='utf-8')


if __name__=='__main__': main(*sys.argv[1:])
