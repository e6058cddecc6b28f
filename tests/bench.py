"""Speed and memory against the peers, as ratios measured in one run. python tests/bench.py clip|crf|eval"""
import argparse
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(p.stem[len("bench_"):] for p in HERE.glob("bench_*.py")))
    name, rest = parser.parse_known_args()
    spec = importlib.util.spec_from_file_location(name.what, HERE / f"bench_{name.what}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(rest)


if __name__ == "__main__":
    main()
