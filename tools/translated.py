"Copy code cells and their outputs into the Chinese notebooks: a cell stands for the one with its id in the English one"
import json
import re
import sys
from pathlib import Path

NBS = Path(__file__).resolve().parents[1]/'nbs'
TWINS = {'zh/index': 'index', 'zh/01_first_run': 'tutorials/01_first_run'}
BADGE = '[![Open in Colab]'
MAP = re.compile(r'<!-- map: begin -->.*?<!-- map: end -->', re.S)  # a list of notebooks, which stands in one place
RELEASED = re.compile(r'<!-- released: begin -->.*?<!-- released: end -->', re.S)


def cells(name): return json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']


def source(cell): return RELEASED.sub('', MAP.sub('', ''.join(cell['source'])))


def written(
    name, # Of a Chinese notebook, as in `TWINS`
): # Its text as it must be
    "A Chinese notebook with the code of its twin"
    path,code = NBS/f'{name}.ipynb',{c['id']: c for c in cells(TWINS[name]) if c['cell_type']=='code'}
    book = json.loads(path.read_text(encoding='utf-8'))
    book['cells'] = [code.get(c['id'], c) for c in book['cells']]
    return json.dumps(book, ensure_ascii=False, indent=1)+'\n'


def skeleton(
    cell, # Of Markdown
): # Levels of its headings, kinds of its blocks, links and pictures without their folder, figures
    "What a translation keeps"
    text = source(cell)
    links = [to.rpartition('/')[2] for to in re.findall(r'\]\(([^)\s]+)', text)]
    plain = re.sub(r'`[^`]*`|\]\([^)]*\)', '', re.sub(r'^```.*?^```', '', text, flags=re.S|re.M))
    return dict(headings=re.findall(r'^#+(?= )', text, re.M), blocks=re.findall(r'^```.*?^```', text, re.S|re.M),
                links=sorted({*links}), pictures=len(re.findall(r'!\[', text)),
                figures=sorted({*re.findall(r'\d+(?:[.,-]\d+)*', plain)}))


def apart(
    name, # As in `TWINS`
): # One phrase for each cell
    "Where a translation is not in step with its twin"
    here,there = cells(name),cells(TWINS[name])
    if [c['id'] for c in here]!=[c['id'] for c in there]: yield f'{name}: other cells, or in another order'
    for a,b in zip(here, there):
        if a['cell_type']!='markdown' or source(b).startswith(BADGE): continue
        mine,theirs = skeleton(a),skeleton(b)
        more = {*mine['links']}-{*theirs['links']} # a link to the Chinese pages, or to the English one
        mine['links'] = sorted({*mine['links']}-more)
        yield from (f'{name}, cell {a["id"]}: other {what}: {mine[what]}, {theirs[what]}' for what in mine
                    if mine[what]!=theirs[what])


def main(): # Exit status
    "Write the code cells, or with `--check` name what is out of step"
    stale = {name: text for name in TWINS if (text := written(name))!=(NBS/f'{name}.ipynb').read_text(encoding='utf-8')}
    check = '--check' in sys.argv[1:]
    for name,text in ({} if check else stale).items(): (NBS/f'{name}.ipynb').write_text(text, encoding='utf-8')
    told = [fault for name in TWINS for fault in apart(name)]
    if check: told += [f'nbs/{name}.ipynb has other code than nbs/{TWINS[name]}.ipynb: make sync' for name in stale]
    for line in told: print(line)
    return int(check and bool(told))


if __name__=='__main__': sys.exit(main())
