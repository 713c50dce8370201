import sys

from blip_integration.cli import main

if __name__ == "__main__":
    sys.exit(main())
