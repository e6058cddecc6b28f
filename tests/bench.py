"""Speed and memory against the peers, as ratios measured in one run. python tests/bench.py clip|crf|eval"""
import argparse
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(p.stem[len("bench_"):] for p in HERE.glob("bench_*.py")))
    name, rest = parser.parse_known_args()
    module = importlib.import_module(f"bench_{name.what}")
    module.main(rest)


if __name__ == "__main__":
    main()
