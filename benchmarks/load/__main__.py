import sys

from benchmarks.load.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
