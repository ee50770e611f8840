import sys

from benchmarks.quality.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
