import sys

from rbm_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
