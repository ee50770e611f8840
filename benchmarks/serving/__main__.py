import sys

from benchmarks.serving.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
