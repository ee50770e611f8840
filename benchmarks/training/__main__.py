import sys

from benchmarks.training.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
