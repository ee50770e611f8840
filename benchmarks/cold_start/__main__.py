import sys

from benchmarks.cold_start.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
