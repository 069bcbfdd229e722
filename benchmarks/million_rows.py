"""Memory and time of preparing very many rows: `python benchmarks/million_rows.py ROWS.jsonl [rows ...]`

Writes the rows again and again, numbered, until there are enough (1,000,000 unless told otherwise), prepares each
file in a process of its own, and prints its seconds and its largest resident memory.
"""
import json, os, subprocess, sys, tempfile, time
from datetime import date
from itertools import cycle, islice
from pathlib import Path

worker = '''
import json, resource, sys, time
from transformers import AutoTokenizer
from sage_finetune.config import resolve_model
from sage_finetune.data import DataReport, prepare_dataset
tokenizer,report = AutoTokenizer.from_pretrained(resolve_model('sage-tiny')),DataReport()
import datasets # counted before the clock starts, as in a run
before,began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,time.perf_counter()
data = prepare_dataset(sys.argv[1], tokenizer, 1024, report=report, cache=sys.argv[2])
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
seconds = round(time.perf_counter()-began, 1)
print(json.dumps(dict(rows=report.read, used=report.used, tokens=report.tokens, seconds=seconds, resident_mb=resident,
                      resident_before_mb=before//1024)))
'''

def main(path, sizes):
    rows = Path(path).read_text(encoding='utf-8').splitlines()
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            big = Path(folder)/'rows.jsonl'
            with big.open('w', encoding='utf-8') as f:
                for i,line in enumerate(islice(cycle(rows), n)):
                    row = json.loads(line)
                    row['question'] = f"({i}) {row['question']}"
                    f.write(json.dumps(row, ensure_ascii=False)+'\n')
            done = subprocess.run([sys.executable, '-c', worker, str(big), folder], check=True, capture_output=True,
                                  text=True, env=os.environ | dict(HF_HUB_OFFLINE='1'))
            print(json.dumps(json.loads(done.stdout.splitlines()[-1]) | dict(
                file_mb=big.stat().st_size//2**20, cores=os.cpu_count(), date=str(date.today()))), flush=True)

if __name__=='__main__':
    if len(sys.argv)<2 or not Path(sys.argv[1]).is_file(): sys.exit(__doc__)
    main(sys.argv[1], [int(a.replace(',', '')) for a in sys.argv[2:]] or [1_000_000])
